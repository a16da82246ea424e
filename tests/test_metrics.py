"Metrics against independent implementations and laws that hold for any input: sets of features, structure, sync, comparisons"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lipsync_nb.metrics import flow_flicker, ms_ssim, msssim_window, psnr, sharpness, ssim
from lipsync_nb.mouth import STEADY, geometry_drift, source_share
from lipsync_nb.sets import FeatureStats, frechet, frechet_distance, kernel_distance, kid
from lipsync_nb.stats import bootstrap_ci, compare, sign_flip_p

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)

def images(seed, *shape): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

@few
@given(seeds, st.integers(33, 180), st.integers(33, 100))
def test_structure_is_that_of_pytorch_msssim(seed, h, w):
    ref = pytest.importorskip('pytorch_msssim')
    x = images(seed, 9, 3, h, w); y = (x + .2*images(seed+1, 9, 3, h, w)).clamp(0, 1)  # nine: more than one part
    one = dict(data_range=1, size_average=False)
    assert torch.allclose(ms_ssim(x, y), ref.ms_ssim(x, y, win_size=msssim_window(min(h,w)), **one), atol=1e-4)
    assert torch.allclose(ssim(x, y), ref.ssim(x, y, **one), atol=1e-4)
    flat = torch.full((h,w), .3)
    assert torch.allclose(ms_ssim(x, y, flat), ms_ssim(x, y), atol=1e-5) and torch.allclose(psnr(x, y, flat), psnr(x, y), atol=1e-3)

@few
@given(seeds, st.integers(2, 40), st.integers(1, 6), st.floats(-1e6, 1e6))
def test_feature_stats_do_not_depend_on_how_features_come(seed, n, d, far):
    rng = np.random.default_rng(seed); x = torch.from_numpy(rng.normal(size=(n,d))+far); cuts = np.sort(rng.integers(0, n+1, 3))
    parts = [x[i:j] for i,j in zip([0,*cuts], [*cuts,n])]
    one,two = FeatureStats(k=7),[FeatureStats(k=7) for _ in '12']
    for i,p in enumerate(parts): one.add(p, f'clip {i}'); two[i%2].add(p, f'clip {i}')
    two = two[1].merge(two[0])
    assert one.n == two.n == n and torch.equal(one.kept, two.kept)
    for o in (one,two):
        np.testing.assert_allclose(o.mean, x.mean(0), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(o.cov, np.atleast_2d(np.cov(x.T)), rtol=1e-6, atol=1e-8)

@few
@given(seeds, st.integers(1, 6))
def test_frechet_is_that_of_scipy_symmetric_and_turns_with_the_axes(seed, d):
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(seed); a,b,q = rng.normal(size=(3,d,d)); a,b,m,q = a@a.T+.1*np.eye(d),b@b.T+.1*np.eye(d),rng.normal(size=d),np.linalg.qr(q)[0]
    t = torch.from_numpy; zero = np.zeros(d)
    f = frechet_distance(t(zero), t(a), t(m), t(b))
    assert f == pytest.approx(m@m + np.trace(a+b-2*sqrtm(a@b).real), abs=1e-6)
    assert f == pytest.approx(frechet_distance(t(m), t(b), t(zero), t(a)), abs=1e-6)
    assert f == pytest.approx(frechet_distance(t(zero), t(q@a@q.T), t(q@m), t(q@b@q.T)), abs=1e-6)

def test_figures_are_those_of_torchmetrics():
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, peak_signal_noise_ratio
        from torchmetrics.image.fid import _compute_fid
        from torchmetrics.image.kid import poly_mmd
    except (ImportError, RuntimeError) as e: pytest.skip(f'torchmetrics cannot be loaded: {e}')
    x,y = images(0, 60, 12).double(),images(1, 60, 12).double()+.1
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), abs=1e-9)
    a,b = FeatureStats().add(x),FeatureStats().add(y)
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(float(_compute_fid(a.mean, a.cov, b.mean, b.cov)), abs=1e-6)
    p = images(0, 2, 3, 192, 192); q = (p + .2*images(1, 2, 3, 192, 192)).clamp(0, 1); one = dict(data_range=1., reduction='none')
    assert torch.allclose(psnr(p, q), peak_signal_noise_ratio(p, q, dim=(1,2,3), **one), atol=1e-4)
    assert torch.allclose(ms_ssim(p, q), multiscale_structural_similarity_index_measure(p, q, **one), atol=1e-4)

def test_more_of_a_fault_is_never_better():
    x = torch.nn.functional.interpolate(images(0, 4, 3, 24, 24), (96,96), mode='bicubic').clamp(0, 1); y = images(1, 4, 3, 96, 96)
    steps = [x+a*(y-x) for a in (0, .1, .2, .4)]
    for f in (ms_ssim, ssim): assert (torch.stack([f(o, x) for o in steps]).diff(dim=0) < 0).all()
    flow = torch.zeros(3,2,96,96); shake = [flow_flicker(x[:1]*(1-a*(torch.arange(4)%2).view(4,1,1,1)), flow) for a in (0, .1, .3)]
    assert shake[0] < 1e-6 < shake[1] < shake[2]
    soft = [torch.nn.functional.avg_pool2d(x, k, 1, k//2, count_include_pad=False) for k in (1, 3, 5, 9)]
    assert (torch.stack([sharpness(o) for o in soft]).diff(dim=0) < 0).all()
    rng = np.random.default_rng(0); f,g = rng.normal(size=(2,200,5))
    made = [f@np.diag([1+a]*5)+a for a in (0, .2, .5, 1)]
    for d in (lambda a,b: frechet(a, b).value, kernel_distance, lambda a,b: kid(a, b).value):
        with np.testing.suppress_warnings() as s:
            s.filter(UserWarning); v = [d(torch.from_numpy(g), torch.from_numpy(o)) for o in made]
        assert v == sorted(v)

@few
@given(seeds, st.integers(2, 30), st.sampled_from(['high', 'low', 'one', 'zero']))
def test_comparison_turns_with_its_sides(seed, n, better):
    rng = np.random.default_rng(seed); a,b = rng.normal(size=(2,n)); a[rng.integers(n)] = math.nan; who = rng.integers(0, 4, n)
    for persons in (None, who):
        r,back = compare(a, b, better, persons=persons),compare(b, a, better, ('B','A'), persons=persons)
        assert (r.gain, r.won, r.p, r.winner) == pytest.approx((-back.gain, 1-back.won, back.p, back.winner)) and r.n == n-1 and r.dropped == 1
        assert not r.winner or (r.gain > 0) == (r.winner == 'A') and not r.lo <= 0 <= r.hi
    ci = bootstrap_ci(b, who)
    assert ci == bootstrap_ci(b, who) or len(set(who)) < 2
    assert math.isnan(ci.lo) or b.min()-1e-9 <= ci.lo <= ci.value+1e-9 and ci.value-1e-9 <= ci.hi <= b.max()+1e-9

@few
@given(seeds, st.floats(0, 1), st.floats(.1, 3))
def test_what_was_mixed_in_is_found_again(seed, share, gain):
    rng = np.random.default_rng(seed); words,source = rng.random((2,60)); made = gain*words + share*source + .1
    assert source_share(made, source, truth=words) == pytest.approx(share, abs=1e-9)

@few
@given(seeds, st.floats(.3, 3), st.floats(-3, 3))
def test_proportions_do_not_depend_on_place_size_and_turn(seed, size, turn):
    rng = np.random.default_rng(seed); face = np.full((5,478,2), np.nan); face[:,list(STEADY)] = rng.normal(size=(len(STEADY),2))*20
    c,s = np.cos(turn),np.sin(turn)
    assert geometry_drift(size*face@np.array([[c,s],[-s,c]])+rng.normal(size=2)*9, face) == pytest.approx(0, abs=1e-6)

@pytest.mark.parametrize('n', [15, 16, 17, 18])
def test_p_does_not_jump_where_flips_become_random(n):
    x = np.random.default_rng(n).normal(.3, 1, n)
    z = abs(x.sum())/(x@x)**.5
    assert sign_flip_p(x) == pytest.approx(math.erfc(z/2**.5), abs=.05)
