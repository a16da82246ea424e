"Where somebody speaks: the same in pieces as in one, in constant memory; and the mouth shuts where nobody does"
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lipsync_nb.core import FPS, HOP, SR, mute_stderr
from lipsync_nb.data.face import mouth_shape, track_faces, warp_crop
from lipsync_nb.data.structure import find_clips
from lipsync_nb.demo import load_truth
from lipsync_nb.infer.core import LipSync
from lipsync_nb.infer.faces import scout
from lipsync_nb.infer.film import to_and_fro
from lipsync_nb.infer.lips import CTX, _take, token_rows
from lipsync_nb.infer.paste import Paster
from lipsync_nb.infer.picture import Picture
from lipsync_nb.infer.voice import breath, closed_shape, gate_at, heard_shape, hush, pieces, speech_gate, steer, tighten, voice_probability
from lipsync_nb.media import probe, read_audio, read_frames
from lipsync_nb.mouth import bilabial_ratio
from lipsync_nb.sample import sample_corpus, sample_generator

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).parents[2]/'shared/data/real')
TENTH = .1/29      # a tenth of a pixel of the 96-pixel crop, whose eyes are 29 apart: no landmark is surer than that

def pluck(n):
    t = np.arange(n)/SR
    return .07*sum(np.sin(2*np.pi*f*t)*np.exp(-3*(t%.4)) for f in (196,247,294,392,784))

def spoken(clips, seconds=1.3):
    "Sound with a pause of each kind after the end of a sentence; its phones; where the pauses are"
    rng = np.random.default_rng(0)
    kinds = dict(silence=np.zeros, room=lambda n: rng.normal(size=n)*10**-2.5, music=pluck)
    out,phones,pauses,t = [],[],{},0.
    for clip,(kind,make) in zip(clips, kinds.items()):
        ph = [o for o in load_truth(clip)['phones'] if o[2] != '_']
        b = ph[-1][1]+.05; ph = [o for o in ph if o[0] > b-1.6]; a = ph[0][0]
        word,pause = read_audio(clip)[int(a*SR):int(b*SR)],make(int(seconds*SR))
        phones += [(s-a+t, e-a+t, p) for s,e,p in ph]; t += len(word)/SR
        pauses[kind] = (t, t+len(pause)/SR); t = pauses[kind][1]
        out += [word, pause]
    return np.concatenate(out).astype(np.float32), phones, pauses

@pytest.fixture(scope='module')
def corpus(): return sample_corpus()

@pytest.fixture(scope='module')
def said(corpus): return spoken([corpus/'p3'/f'c0{i}.mp4' for i in (0,2,5)])

@pytest.mark.parametrize('by', ['silero','loudness'])
def test_pieces_make_no_difference(said, by):
    wav = said[0]
    gate = speech_gate(wav, by=by)
    assert gate.dtype == np.float32 and len(gate) == -(-len(wav)//HOP) and 0 <= gate.min() and gate.max() <= 1
    for size in (1, 1000, SR) if by == 'loudness' else (700, SR): np.testing.assert_array_equal(speech_gate(wav, by=by, size=size), gate)
    np.testing.assert_array_equal(np.concatenate(list(pieces(hush(wav, gate), 1234))), np.asarray(hush(wav, gate)))

def test_gate_is_open_in_speech_and_shut_in_pauses(corpus):
    "Every clip of one voice after the other: hardly a phone is lost, and pauses of all kinds are found"
    for p in range(4):
        wav,phones,pauses = spoken([corpus/f'p{p}'/f'c0{i}.mp4' for i in (1,3,6)])
        gate,t = speech_gate(wav),(np.arange(-(-len(wav)//HOP))+.5)*HOP/SR
        voiced = np.any([(t >= s) & (t < e) for s,e,_ in phones], 0)
        assert (gate[voiced] > .5).mean() > .98
        for k,(a,b) in pauses.items(): assert gate[(t > a+.25) & (t < b-.2)].mean() < .05, (p, k)

def test_noise_and_ends():
    "A voice that ends in noise of its own loudness still ends; spans at the edges of a sound stay within it"
    db = np.repeat(np.float32([-20,-20]), 50)
    np.testing.assert_allclose(tighten([[0,.5],[.8,1]], db), [[0,.45],[.8,1.]])
    for n in (0, 1, 159, 161, 511, 513): assert len(speech_gate(np.zeros(n, np.float32))) == -(-n//HOP)

CHILD = '''
import resource, sys, numpy as np
from lipsync_nb.infer.voice import hush, pieces, speech_gate
class Long:                                            # half an hour that is made as it is read
    def __init__(self, n): self.n,self.most = n,0
    def __len__(self): return self.n
    def __getitem__(self, s):
        a,b,_ = s.indices(self.n); self.most = max(self.most, b-a)
        return (np.sin(np.arange(a, b)*.1)*.1).astype(np.float32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
def run(seconds, by):
    wav = Long(seconds*16000); gate = speech_gate(wav, by=by)
    for x in pieces(hush(wav, gate)): pass
    assert wav.most <= 60*16000 and len(gate) == seconds*100
for by,seconds in (('loudness',1800), ('silero',120)):
    run(30, by); before = peak(); run(seconds, by)
    print(by, round(peak()-before, 1))
assert 'silero_vad' not in sys.modules
'''

@pytest.mark.skipif(sys.platform != 'linux', reason='counts memory as Linux does')
def test_memory_is_constant(root):
    r = subprocess.run([sys.executable, '-c', CHILD], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    grown = {k: float(v) for k,v in (o.split() for o in r.stdout.splitlines())}
    assert grown.keys() == {'loudness','silero'} and max(grown.values()) < 30, grown  # MiB; half an hour of samples has 110

def test_without_the_net(root):
    "Where Silero is not installed the gate goes by loudness, and says so"
    code = ("import sys, importlib.util as u, numpy as np; find = u.find_spec\n"
            "u.find_spec = lambda n, *a: None if n == 'silero_vad' else find(n, *a)\n"
            "from lipsync_nb.infer.voice import speech_gate, voice_detector\n"
            "x = np.zeros(32000, np.float32); x[8000:16000] = .1*np.sin(np.arange(8000)*.1)\n"
            "g = speech_gate(x); print(voice_detector(), g[75], g[150])")
    r = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert r.stdout.split() == ['loudness','1.0','0.0'], r.stderr

def test_threads_are_left_alone(said):
    n = torch.get_num_threads(); torch.set_num_threads(2)
    try: speech_gate(said[0]); assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(n)

@pytest.mark.skipif(not REAL.is_dir(), reason='no real clips: LIPSYNC_REAL_DATA names no folder')
def test_real_voices():
    "Somebody speaks in every real clip, most of the time in most of them"
    persons = {}
    for c in find_clips(REAL): persons.setdefault(c.person, c.path)
    paths = [p for p in persons.values() if probe(p).duration < 30][:16]
    share = np.array([(speech_gate(read_audio(p)[:8*SR]) > .5).mean() for p in paths])
    assert len(share) > 3 and share.min() > .3 and np.median(share) > .8, share

class Dub:
    "A clip of the corpus, to be dubbed in parts as `LipSync` does it"
    def __init__(self, clip):
        self.lip = LipSync(sample_generator(), batch=16)
        with mute_stderr(): self.scene = scout(clip, self.lip.size)
        self.face, = self.scene.choose(); self.paste = Paster(self.lip.size, colour=False, sharpen=0)
        self.frames = [f for _,f in read_frames(clip)]
        self.crops = [warp_crop(f, M, self.lip.size) for f,M in zip(self.frames, self.face.Ms)]
        self.ident,self.own = self.lip.know(self.face)[1],lips(self.frames)
        t,spoken = (np.arange(len(self.own))+.5)/FPS,[o for o in load_truth(clip)['phones'] if o[2] != '_']
        self.level = float(np.nanmean(self.own[~np.any([(t > s-.1) & (t < e+.1) for s,e,_ in spoken], 0),0]))
        self.closed = closed_shape(self.own)

    @torch.inference_mode()
    def __call__(self, wav, how='', at=None, t=None, openness=1.):
        "Shape of the mouth in each frame (m,3), and the middle of each in seconds"
        gate,lip,out,prev = speech_gate(wav),self.lip,[],None
        if at is None: at,t = to_and_fro(self.scene.times, len(wav)/SR, self.scene.gap)
        at = np.rint(at).astype(int)
        tokens = lip.listen(np.asarray(hush(wav, gate)) if 'hush' in how else wav, t[-1]+1/FPS, silence=False).tokens
        for i in range(0, len(at), 16):
            a,s = at[i:i+16],t[i:i+16]; rows = _take(tokens, token_rows(s))
            shape = steer(heard_shape(lip.gen, rows, 1, CTX), gate_at(gate, s)[:,None], self.closed, openness, s[:,None]) if 'steer' in how else None
            raw = lip.gen.paint(lip._pictures([self.crops[j] for j in a])[:,None], self.ident(a), rows, CTX, shape).transpose(0, 1)
            y,prev = lip.gen.smooth(raw, prev)[0].clamp(0, 1),raw[:,-1:]
            out += [self.paste(Picture.of(self.frames[j]), c, c, self.face.Ms[j]).rgb() for j,c in zip(a, (y*255).round().byte().permute(0,2,3,1).numpy())]
        return lips(out), t+.5/FPS

def lips(frames):
    with mute_stderr(): return mouth_shape(track_faces(frames))

@pytest.fixture(scope='module')
def dub(corpus): return Dub(corpus/'p3'/'c03.mp4')

def within(t, a, b): return (t >= a+.15) & (t < b-.2)

def test_mouth_is_shut_in_pauses(dub, said):
    "In silence, in a room and in music: at most 1.3 times as open as the person's own closed mouth; speech is as before"
    wav,phones,pauses = said
    (before,t),(after,_) = dub(wav),dub(wav, 'hush steer')
    level = max(dub.level, TENTH)
    for k,(a,b) in pauses.items(): assert np.nanmean(after[within(t, a, b),0]) <= 1.3*level, k
    assert np.nanmean(before[within(t, *pauses['music']),0]) > 3*level           # there was something to shut
    talk = np.any([(t >= s) & (t < e) for s,e,_ in phones], 0)
    assert np.nanstd(after[talk,0])/np.nanstd(before[talk,0]) >= .97
    assert bilabial_ratio(after[:,0], phones, t) <= bilabial_ratio(before[:,0], phones, t)+.02

def test_openness_is_followed(dub, said):
    wav = said[0][:int(said[2]['silence'][0]*SR)]
    small,usual,large = (np.nanmean(dub(wav, 'hush steer', openness=o)[0][:,0]) for o in (.5,1.,1.5))
    assert small < .8*usual and large > 1.1*usual

def test_nothing_but_silence(dub):
    "A frame with a wide open mouth, shown for two seconds in which nobody speaks: the mouth is closed, and lives"
    at,t = np.full(50, int(np.nanargmax(dub.own[:,0]))),np.arange(50)/FPS
    o = dub(np.zeros(2*SR, np.float32), 'hush steer', at, t)[0]
    assert np.nanmean(o[:,0]) <= 1.3*max(dub.level, TENTH) < np.nanmax(dub.own[:,0])
    still = dub(np.zeros(2*SR, np.float32), 'hush', at, t)[0]
    assert np.nanstd(o[:,1]) > 2*np.nanstd(still[10:,1])                          # the first frames come to rest

def test_micro_motion_is_small():
    z = breath(np.arange(0, 1800, .04))
    assert z[...,0].abs().max() <= .001 and z.abs().max() < .02 and z.diff(dim=0).abs().max() < .002

def test_two_threads_do_not_hear_each_other():
    "The net has a memory: listened to in two threads at once, it must say of each sound what it says of it alone"
    from concurrent.futures import ThreadPoolExecutor
    clips = sorted(sample_corpus().rglob('*.mp4'))[:2]; wavs = [read_audio(c) for c in clips]*2
    alone = [voice_probability(w) for w in wavs]
    with ThreadPoolExecutor(4) as ex: together = list(ex.map(voice_probability, wavs))
    for a,b in zip(alone, together): np.testing.assert_array_equal(a, b)
