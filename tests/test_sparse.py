"Sparse attention is exact: each backend equals the masked dense oracle, gradients and padding too, whatever the pattern and the length; compiled, exported and in half precision as well"
import warnings
import pytest, torch
from hypothesis import given,settings,strategies as st
from lipsync_nb.models.sparse import SparsePattern,chunk_plan,pattern_mask,sparse_attention

def patterns(causal=st.booleans()):
    "Any pattern; a causal one has no look-ahead to choose"
    def make(local, stride, causal, reach, ahead): return SparsePattern(local, stride, causal, reach, None if causal else ahead)
    return st.builds(make, st.integers(0, 40), st.integers(1, 50), causal, st.one_of(st.none(), st.integers(0, 120)), st.one_of(st.none(), st.integers(0, 60)))

# seed, batch, heads, tokens, features of a head, pattern, padding: none, at the end, anywhere
cases = st.tuples(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 200), st.integers(1, 12), patterns(), st.sampled_from(['none','end','anywhere']))

def inputs(seed, b, h, n, d, padding, dtype=torch.float32):
    "Queries, keys, values and key mask, drawn from a seed; some samples may be nothing but padding"
    g = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(b,h,n,d, generator=g).to(dtype) for _ in range(3)]
    if padding=='none': return qkv,None
    if padding=='end': return qkv,torch.arange(n)<torch.randint(0, n+1, (b,1), generator=g)
    return qkv,torch.rand(b,n, generator=g)<torch.rand(b,1, generator=g)

def run(backend, qkv, key_mask, pattern):
    "Output and gradients of a fixed weighting of it"
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = sparse_attention(*qkv, pattern, backend, key_mask)
    w = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [out.detach(),*torch.autograd.grad((out*w).sum(), qkv)]

def same(xs, ys, atol=1e-5, rtol=1e-4):
    for x,y in zip(xs, ys):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, atol=atol, rtol=rtol)

def by_hand(q, k, v, mask): return (q@k.transpose(-1,-2)*q.shape[-1]**-.5).masked_fill(~mask, -torch.inf).softmax(-1)@v

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), patterns())
def test_mask_is_the_definition(n, p):
    mask = pattern_mask(n, p)
    for i in range(n):
        for j in range(0, n, 7):
            seen = abs(i-j)<=p.local or j%p.stride==p.stride-1 and (p.reach is None or abs(i-j)<=p.reach)
            assert mask[i,j]==(seen and (not p.causal or j<=i) and (p.ahead is None or j<=i+p.ahead))

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), patterns())
def test_bounds_are_what_the_mask_shows(n, p):
    i,j = pattern_mask(n, p).nonzero().T
    assert p.look is None or (j-i).max()<=p.look
    assert p.past is None or (i-j).max()<=p.past

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), patterns())
def test_plan_lists_each_pair_once(n, p):
    index,mask = chunk_plan(n, p)
    size,rows = mask.shape[1],torch.zeros(len(index)*mask.shape[1], n, dtype=torch.long)
    for c in range(len(index)): rows[c*size:(c+1)*size].index_add_(1, index[c], mask[c].long())
    assert (rows[:n]==pattern_mask(n, p)).all()

@settings(max_examples=25, deadline=None)
@given(cases)
def test_dense_is_the_formula(case):
    *shape,p,padding = case
    (q,k,v),key_mask = inputs(*shape, padding)
    mask = pattern_mask(q.shape[2], p)
    if key_mask is None: return same([sparse_attention(q, k, v, p, 'dense')], [by_hand(q, k, v, mask)])
    out = sparse_attention(q, k, v, p, 'dense', key_mask)
    for o,m,*x in zip(out, key_mask, q, k, v):
        assert not o[:,~m].any()                                # padding comes out as zeros
        if m.any(): same([o[:,m]], [by_hand(*(y[:,m] for y in x), mask[m][:,m])])

@settings(max_examples=120, deadline=None)
@given(cases)
def test_chunk_equals_dense(case):
    *shape,p,padding = case
    qkv,key_mask = inputs(*shape, padding)
    chunk,dense = (run(b, qkv, key_mask, p) for b in ('chunk','dense'))
    same(chunk, dense)
    if key_mask is not None:
        for x in chunk: assert not x.transpose(1, 2)[~key_mask].any()

@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(0, 9999), st.integers(1, 2), st.integers(1, 2), st.integers(1, 90), st.just(16), patterns(), st.sampled_from(['none','end','anywhere'])))
def test_flex_equals_dense(case):
    *shape,p,padding = case
    (q,k,v),key_mask = inputs(*shape, padding)
    with torch.no_grad(),warnings.catch_warnings():
        warnings.simplefilter('ignore')                         # it says that it is not compiled on a CPU
        same([sparse_attention(q, k, v, p, 'flex', key_mask)], [sparse_attention(q, k, v, p, 'dense', key_mask)])

@settings(max_examples=30, deadline=None)
@given(cases)
def test_padding_may_hold_anything(case):
    *shape,p,_ = case
    qkv,key_mask = inputs(*shape, 'anywhere')
    other = [torch.where(key_mask[:,None,:,None], x, 1e4) for x in qkv]
    for b in ('chunk','dense'): same(run(b, other, key_mask, p), run(b, qkv, key_mask, p))

@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(0, 9999), st.integers(1, 2), st.integers(1, 2), st.integers(2, 150), st.just(4), patterns(), st.just('none')), st.integers(0, 149))
def test_the_future_beyond_the_look_ahead_is_not_heard(case, i):
    *shape,p,padding = case
    qkv,_ = inputs(*shape, padding)
    n,i = qkv[0].shape[2],i%qkv[0].shape[2]
    if p.look is None: return
    later = [torch.cat([x[:,:,:i+p.look+1],torch.full_like(x[:,:,i+p.look+1:], 1e3)], 2) for x in qkv]
    for b in ('chunk','dense'): same([sparse_attention(*later, p, b)[:,:,:i+1]], [sparse_attention(*qkv, p, b)[:,:,:i+1]])

@settings(max_examples=20, deadline=None)
@given(cases)
def test_autocast_is_half_precision_of_the_same(case):
    *shape,p,padding = case
    qkv,key_mask = inputs(*shape, padding)
    ref = run('dense', qkv, key_mask, p)
    for b in ('chunk','dense'):
        with torch.autocast('cpu', torch.bfloat16): half = run(b, qkv, key_mask, p)
        assert half[0].dtype==torch.bfloat16 and all(x.dtype==torch.float32 for x in half[1:])
        for x,y in zip(half, ref): assert (x.float()-y).norm()<=.03*y.norm()+.05*y.numel()**.5

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_keep_theirs(dtype):
    qkv,key_mask = inputs(0, 2, 2, 100, 8, 'end', dtype)
    for b in ('chunk','dense'): assert sparse_attention(*qkv, SparsePattern(5, 7), b, key_mask).dtype==dtype

def test_gradient_against_finite_differences():
    qkv,key_mask = inputs(0, 2, 1, 21, 2, 'end', torch.float64)
    qkv = [x.requires_grad_() for x in qkv]
    for p in (SparsePattern(3, 5, reach=9), SparsePattern(3, 5, True, 9), SparsePattern(3, 5, reach=9, ahead=2)):
        assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, p, 'chunk', key_mask), qkv)

@pytest.mark.parametrize('backend,padding', [('chunk','end'), ('dense','end'), ('auto','none')])
def test_compiles_as_one_graph_with_gradients(backend, padding):
    "Traced whole; a few graphs (short and long, say) serve all lengths"
    p,graphs = SparsePattern(4, 6, reach=20, ahead=3),[]
    def aot(gm, args):
        from torch._dynamo.backends.debugging import aot_eager
        graphs.append(gm); return aot_eager(gm, args)
    torch.compiler.reset()
    f = torch.compile(lambda q, k, v, m: sparse_attention(q, k, v, p, backend, m), backend=aot, fullgraph=True, dynamic=True)
    for n in (75,40,300,77,333):
        qkv,key_mask = inputs(n, 2, 2, n, 8, padding)
        xs,ys = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
        a,b = f(*xs, key_mask),sparse_attention(*ys, p, 'dense', key_mask)
        same([a,*torch.autograd.grad(a.square().sum(), xs)], [b,*torch.autograd.grad(b.square().sum(), ys)])
    assert len(graphs)<=3
    torch.compiler.reset()

class Attend(torch.nn.Module):
    def __init__(self, p): super().__init__(); self.p = p
    def forward(self, q, k, v, key_mask=None): return sparse_attention(q, k, v, self.p, 'chunk', key_mask)

@pytest.mark.parametrize('p', [SparsePattern(), SparsePattern(5, 3, True, 40), SparsePattern(20, 30, reach=None), SparsePattern(8, 8, reach=24, ahead=4)], ids=str)
@pytest.mark.parametrize('padding', ['none', 'end'])
def test_chunk_is_exported_for_any_length_and_batch(p, padding):
    any_ = torch.export.Dim.DYNAMIC
    def args(n, b): qkv,key_mask = inputs(n, b, 2, n, 8, padding); return (*qkv,) if key_mask is None else (*qkv,key_mask)
    prog = torch.export.export(Attend(p), args(100, 2), dynamic_shapes=tuple({0:any_,(2 if x.ndim==4 else 1):any_} for x in args(100, 2))).module()
    for n,b in ((1,1),(2,3),(15,1),(16,2),(33,1),(64,2),(257,3),(1000,1)): same([prog(*args(n, b))], [sparse_attention(*args(n, b)[:3], p, 'dense', *args(n, b)[3:])])

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('p', [SparsePattern(), SparsePattern(20, 30, True), SparsePattern(ahead=4), SparsePattern(7, 50, reach=None)], ids=str)
@pytest.mark.parametrize('padding', ['none', 'end', 'anywhere'])
@pytest.mark.parametrize('n', [100, 512, 777])
def test_on_a_gpu(p, padding, n):
    qkv,key_mask = inputs(n, 2, 2, n, 32, padding)
    ref = run('dense', qkv, key_mask, p)
    gpu,key_mask = [x.cuda() for x in qkv],None if key_mask is None else key_mask.cuda()
    for b in ('dense','chunk','flex'): same([x.cpu() for x in run(b, gpu, key_mask, p)], ref, atol=1e-4, rtol=1e-3)
