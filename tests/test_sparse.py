"Sparse attention is exact: `chunk` equals the masked dense oracle, gradients and padding too, whatever the pattern and the length"
import torch
from hypothesis import given,settings,strategies as st
from lipsync_nb.models.sparse import SparsePattern,pattern_mask,sparse_attention

patterns = st.builds(SparsePattern, local=st.integers(0, 40), stride=st.integers(1, 50), causal=st.booleans(),
                     reach=st.one_of(st.none(), st.integers(0, 120)))

def run(backend, seed, b, h, n, d, pattern, padded):
    "Output and gradients for inputs drawn from a seed"
    g = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(b,h,n,d, generator=g).requires_grad_() for _ in range(3)]
    lens = torch.randint(0, n+1, (b,1), generator=g)
    out = sparse_attention(*qkv, pattern, backend, torch.arange(n)<lens if padded else None)
    w = torch.randn(out.shape, generator=g)
    return [out.detach(),*torch.autograd.grad((out*w).sum(), qkv)]

@settings(max_examples=80, deadline=None)
@given(st.tuples(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 3), st.integers(1, 200), st.integers(1, 12), patterns, st.booleans()))
def test_chunk_equals_dense(args):
    for a,b in zip(run('chunk', *args), run('dense', *args)):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 150), patterns)
def test_mask_is_the_definition(n, p):
    mask = pattern_mask(n, p)
    for i in range(n):
        for j in range(0, n, 7):
            seen = abs(i-j)<=p.local or j%p.stride==p.stride-1 and (p.reach is None or abs(i-j)<=p.reach)
            assert mask[i,j]==(seen and (not p.causal or j<=i))
