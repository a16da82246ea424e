"The live audio encoder gives the offline encoder's tokens, each as early as possible, however the sound is cut; its work and its memory do not grow; export serves every length"
from functools import lru_cache
import pytest, torch
from hypothesis import given,settings,strategies as st
from lipsync_nb.models.audio import AudioEncoder,StreamEncoder
from lipsync_nb.models.layers import count_flops
from lipsync_nb.models.sparse import SparsePattern

@lru_cache
def encoder(pattern, layers=2):
    torch.manual_seed(0)
    return AudioEncoder.from_preset('demo', pattern=pattern, layers=layers).eval()

def patterns():
    def make(local, stride, causal, reach, ahead): return SparsePattern(local, stride, causal, reach, None if causal else ahead)
    return st.builds(make, st.integers(0, 12), st.integers(1, 20), st.booleans(), st.integers(0, 40), st.one_of(st.none(), st.integers(0, 12)))

@settings(max_examples=60, deadline=None)
@given(patterns(), st.integers(1, 3), st.integers(1, 60), st.lists(st.integers(0, 90), min_size=1, max_size=20), st.integers(1, 150), st.integers(0, 9999))
def test_live_equals_offline(pattern, layers, frames, cuts, piece, seed):
    enc,mel = encoder(pattern, layers),torch.randn(2,4*frames,80, generator=torch.Generator().manual_seed(seed))
    live,out,n,cuts = StreamEncoder(enc, most=9, piece=piece),[],0,[*cuts,4*frames]
    for m in cuts:
        out.append(live.push(mel[:,n:n+m])); n = min(n+m, 4*frames)
        assert sum(o.shape[1] for o in out)==max(0, (n-3)//2-enc.cfg.look)    # not one frame later than must be, nor earlier
    with torch.no_grad(): ref = enc(mel)
    torch.testing.assert_close(torch.cat([*out,live.flush()], 1), ref, atol=1e-5, rtol=1e-5)

@settings(max_examples=30, deadline=None)
@given(patterns(), st.integers(1, 3), st.integers(20, 60), st.integers(0, 100))
def test_offline_hears_no_farther_than_it_says(pattern, layers, frames, k):
    "Sound beyond the delay changes no bit of what a token is"
    enc,mel = encoder(pattern, layers),torch.randn(1,4*frames,80, generator=torch.Generator().manual_seed(k))
    k = k%(2*frames)
    rows = 2*k+2+round(100*enc.cfg.delay)
    other = torch.cat([mel[:,:rows],torch.randn_like(mel[:,rows:])], 1)
    with torch.no_grad(): torch.testing.assert_close(enc(other)[:,:k+1], enc(mel)[:,:k+1], atol=1e-6, rtol=1e-5)

def test_an_hour_in_it_is_as_exact_and_as_fast():
    "Positions are far out, the work and the store are those of the first minute"
    enc,tail = encoder(SparsePattern(8, 8, reach=24, ahead=4)),torch.randn(1,400,80)
    live = StreamEncoder(enc)
    live.push(torch.randn(1,2000,80))
    def store(): return sum(o.numel() for l in live.layers for o in (l.x,l.q,l.k,l.v,l.at)) + live.rows.numel()
    early = count_flops(live.push, torch.randn(1,400,80)),store()
    for l in live.layers: l.n,l.start,l.at = l.n+180_000,l.start+180_000,l.at+180_000    # a whole number of strides
    late = count_flops(live.push, torch.randn(1,400,80)),store()
    assert late==early
    live.push(torch.randn(1,208,80))                                     # up to a multiple of the stride
    with torch.no_grad(): ref = enc(tail)
    got = torch.cat([live.push(tail),live.flush()], 1)
    heard = 2*24+2                                                       # how far back the tail's tokens hear what was before it
    torch.testing.assert_close(got[:,-ref.shape[1]:][:,heard:], ref[:,heard:], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name', ['demo', 'stream'])
def test_presets_that_may_be_live(name):
    torch.manual_seed(0)
    enc,mel = AudioEncoder.from_preset(name).eval(),torch.randn(1,4*200,80)
    live = StreamEncoder(enc)
    with torch.no_grad(): torch.testing.assert_close(torch.cat([*(live.push(o) for o in mel.split(4, 1)),live.flush()], 1), enc(mel), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name', ['base', 'hd'])
def test_presets_that_hear_half_a_minute_ahead_are_refused(name):
    with pytest.raises(ValueError, match='waits at most 2 s, got one that waits 30.75 s'): StreamEncoder(AudioEncoder.from_preset(name))

@pytest.mark.parametrize('preset', ['demo', 'stream'])
def test_exported_encoder_serves_every_length(preset):
    enc = AudioEncoder.from_preset(preset, backend='chunk', layers=2).eval()
    shapes = ({0:torch.export.Dim.DYNAMIC,1:4*torch.export.Dim('frames')},)
    with torch.no_grad():
        prog = torch.export.export(enc, (torch.randn(2,240,80),), dynamic_shapes=shapes).module()
        for b,n in ((1,4),(2,8),(3,60),(1,2000)): torch.testing.assert_close(prog(m := torch.randn(b,n,80)), enc(m), atol=1e-5, rtol=1e-5)

def test_half_precision_live_and_offline():
    enc,mel = encoder(SparsePattern(8, 8, reach=24, ahead=4)),torch.randn(1,400,80)
    with torch.no_grad():
        ref = enc(mel)
        with torch.autocast('cpu', torch.bfloat16):
            live = StreamEncoder(enc)
            out = torch.cat([live.push(mel[:,:123]),live.push(mel[:,123:]),live.flush()], 1)
            off = enc(mel)
    for x in (out,off): assert (x.float()-ref).norm()<.05*ref.norm()

def test_what_lies_in_memory_is_bounded_by_the_pattern():
    pattern = SparsePattern(8, 8, reach=24, ahead=4)
    live = StreamEncoder(encoder(pattern), piece=40)
    live.push(torch.randn(1,4000,80))
    for l in live.layers:
        assert l.x.shape[1]==pattern.ahead
        assert len(l.at)<=pattern.local+pattern.ahead+pattern.reach//pattern.stride+1
