"Engines: long sound in pieces for any pattern, ONNX as PyTorch with weights nobody trained, and nothing left behind by a failed export"
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest, torch
from lipsync_nb.core import LipSyncError
from lipsync_nb.data.audio import mel_spectrogram, mel_window
from lipsync_nb.infer.engine import TorchEngine, encode_long, hearing, pieces, rehearse
from lipsync_nb.infer.onnx import OnnxEngine, export_onnx, export_part, onnx_parts
from lipsync_nb.models.audio import AudioEncoder, audio_presets
from lipsync_nb.models.generator import Generator
from lipsync_nb.models.sparse import SparsePattern

def ear(**kw):
    "An engine that only listens, with random weights"
    torch.manual_seed(0)
    enc = AudioEncoder(replace(audio_presets['demo'], **kw)).eval()
    return SimpleNamespace(cfg=SimpleNamespace(audio=enc.cfg), encode_audio=enc)

def noise(n, seed=0): return np.random.default_rng(seed).normal(0, .1, n).astype(np.float32)

PATTERNS = [SparsePattern(local=8, stride=8, reach=24), SparsePattern(local=5, stride=7, reach=20), SparsePattern(local=9, stride=4, reach=3),
            SparsePattern(local=6, stride=5, reach=30, ahead=2), SparsePattern(local=6, stride=6, reach=18, causal=True), SparsePattern(local=0, stride=1, reach=4)]

@pytest.mark.parametrize('p', PATTERNS, ids=str)
@pytest.mark.parametrize('size', [1, 23, 64])
def test_pieces_give_the_tokens_of_the_whole(p, size):
    e,n = ear(pattern=p),150
    wav = noise(n*640-123)
    with torch.inference_mode(): whole = e.encode_audio(torch.from_numpy(mel_window(mel_spectrogram(wav, n), 0, n, 8))[None])[0]
    got = torch.cat(list(encode_long(e, wav, n, size=size)))
    assert got.shape == whole.shape and (got-whole).abs().max() < 1e-5

@pytest.mark.parametrize('p', PATTERNS, ids=str)
def test_nothing_beyond_the_hearing_counts(p):
    e = ear(pattern=p); (back,ahead),i = hearing(e.cfg.audio),100
    mel = torch.randn(1, 480, 80, requires_grad=True)
    e.encode_audio(mel)[0,i,0].backward()                              # one feature: the norm makes their sum a constant
    heard = mel.grad[0].abs().sum(1).nonzero()[:,0]//2
    assert i-back <= heard.min() <= i <= heard.max() <= i+ahead

def test_pieces_cover_everything_once_and_stay_small():
    for n in (1, 9, 4096, 50_000):
        o = list(pieces(n, audio_presets['base'], 1000))
        assert o[0][2] == 0 and o[-1][3] == 2*n and all(p[3] == q[2] for p,q in zip(o, o[1:]))
        assert all(0 <= lo <= a < b <= hi <= 2*n and lo%2 == hi%2 == 0 and hi-lo <= 2000+2*1538+34 for lo,hi,a,b in o)

def test_long_sound_is_read_in_small_bits_and_in_order():
    e,asked,n = ear(),[],2000
    def read(a, b): asked.append((a, b)); return np.zeros(max(0, min(b, n*640)-a), np.float32)
    assert sum(len(o) for o in encode_long(e, read, n, size=100)) == 2*(n+16)
    assert max(b-a for a,b in asked) < 170*640 and sorted(asked) == asked and asked[0][0] == 0

def test_an_error_of_the_reader_comes_through():
    def read(a, b): raise LipSyncError('the disk is gone')
    with pytest.raises(LipSyncError, match='the disk is gone'): next(encode_long(ear(), read, 100))

def shaken(preset):
    "A generator with random weights everywhere, also where training starts from zero"
    torch.manual_seed(1)
    gen = Generator.from_preset(preset)
    with torch.no_grad():
        for p in gen.parameters():
            if not p.any(): p.normal_(0, .05)
    return gen.for_inference()

@pytest.mark.parametrize('preset,name', [('demo','paint'), ('demo','smooth'), ('base','paint')])
def test_onnx_paints_what_torch_paints(preset, name, tmp_path):
    ort = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    gen = shaken(preset); export_part(gen, name, tmp_path/'part.onnx')
    sess = ort.InferenceSession(tmp_path/'part.onnx', providers=['CPUExecutionProvider'])
    with torch.no_grad():
        f,xs = onnx_parts(gen)[name]
        for n in (1, 3, 16):
            xs = {k: torch.rand(n, *x.shape[1:]) for k,x in xs.items()}
            y,got = f(gen, *xs.values()),sess.run(None, {k: x.numpy() for k,x in xs.items()})[0]
            assert (y-xs[next(iter(xs))]).abs().max() > .05           # something was painted
            assert np.abs(got-y.numpy()).max() < 1e-5

def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    def fail(gen, name, path):
        if name == 'hear': raise KeyboardInterrupt
        path.write_bytes(b'half')
    monkeypatch.setattr('lipsync_nb.infer.onnx.export_part', fail)
    with pytest.raises(KeyboardInterrupt): export_onnx(Generator.from_preset('demo'), tmp_path/'out')
    assert not list(tmp_path.iterdir())
    with pytest.raises(LipSyncError, match='is not an exported generator'): OnnxEngine(tmp_path/'out', 'cpu')

def test_torch_engine_leaves_its_generator_alone_and_repeats_itself():
    gen = Generator.from_preset('demo').train()
    before = {k: v.clone() for k,v in gen.state_dict().items()}
    f = rehearse(TorchEngine(gen, 'cpu'), 5)
    assert f().numpy().tobytes() == f().numpy().tobytes()
    assert gen.training and all(p.requires_grad for p in gen.parameters()) and all(torch.equal(v, before[k]) for k,v in gen.state_dict().items())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_torch_engine_on_a_gpu():
    gen = Generator.from_preset('demo')
    cpu,gpu = (rehearse(TorchEngine(gen, o, half=False), 4)() for o in ('cpu','cuda'))
    half = rehearse(TorchEngine(gen, 'cuda'), 4)()
    assert half.dtype == torch.float32 and (gpu.cpu()-cpu).abs().max() < 1e-2 and (half.cpu()-cpu).abs().max() < .05
