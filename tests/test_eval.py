"The judges of lipsync_nb.eval: every fake is caught by the figure meant for it, and every frame is accounted for"
import math

import cv2
import numpy as np
import pytest
import torch

from lipsync_nb.core import LipSyncError, mask_box
from lipsync_nb.data.folder import load_meta
from lipsync_nb.data.index import load_index
from lipsync_nb.eval.features import load_scorer
from lipsync_nb.eval.judge import METRICS, in_order, judge, judge_many
from lipsync_nb.eval.seen import Pair, Seen, align_film, read_phones, see_crops, see_folder, see_pair
from lipsync_nb.media import read_audio, read_frames, write_audio, write_video
from lipsync_nb.pool import TaskError
from lipsync_nb.sample import sample_corpus, sample_data, sample_expert

T,B,L,R = mask_box(96)
N_CLIPS = 4

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def held():
    "Held-out clips with their phones, cut to one length, each of another person"
    df = load_index(sample_data()); df = df[df.split == 'test'].groupby('person').head(1)[:N_CLIPS]
    seen = [see_folder(sample_data()/f) for f in df.folder]; n = min(map(len, seen))
    seen = [Seen(s.crops[:n], s.mel[:4*n], s.landmarks[:n], s.valid[:n]) for s in seen]
    return [(s, read_phones((sample_corpus()/load_meta(sample_data()/f)['source']['path']).with_suffix('.TextGrid'))) for s,f in zip(seen, df.folder)]

@pytest.fixture(scope='module')
def scorer(): return load_scorer(sample_expert('scorer'))

def paint(real, make, mel=None):
    "A clip with `make(i)` in the painted region"
    c = real.crops.copy()
    for i in range(len(c)): c[i,T:B,L:R] = make(i)
    return see_crops(c, real.mel if mel is None else mel)

def blurred(s, other): return paint(s, lambda i: cv2.GaussianBlur(s.crops[i], (0,0), 1.5)[T:B,L:R])
def static(s, other):  return paint(s, lambda i: s.crops[len(s)//2,T:B,L:R])
def swapped(s, other): return Seen(s.crops, other.mel, s.landmarks, s.valid)   # the right mouth, somebody else's sound
def jitter(s, other):
    rng = np.random.default_rng(0)
    def nudged(i): y,x = rng.integers(-1, 2, 2); return s.crops[i,T+y:B+y,L+x:R+x]
    return paint(s, nudged)

@pytest.fixture(scope='module')
def table(held, scorer):
    "Mean of every figure over the clips, for the real row and for each fake"
    def mean(rows): return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
    def row(fake):
        pairs = [(s, held[(i+1)%len(held)][0], p) for i,(s,p) in enumerate(held)]
        return mean([judge(s, fake(s, o), scorer, p) for s,o,p in pairs])
    return {f.__name__: row(f) for f in (blurred, static, swapped, jitter)} | dict(real=mean([judge(s, s, scorer, p) for s,p in held]))

def test_blurred(table):
    "Sharpness catches a blurred mouth; the others hardly see it"
    t = table['blurred']
    assert t['sharpness'] < .7
    assert t['mouth_ms_ssim'] > .9 and t['sync_acc'] > table['real']['sync_acc']-.1 and t['mouth_corr'] > .8
    assert all(table[k]['sharpness'] > .9 for k in ('static','swapped','jitter'))

def test_static(table):
    "A mouth that never moves: no articulation, lips open on p, b and m; the picture as a whole looks fine"
    t = table['static']
    assert t['articulation'] < .2 and t['mouth_corr'] < .5
    assert t['ms_ssim'] > .9
    assert all(table[k]['articulation'] > .5 for k in ('blurred','swapped','jitter'))

def test_jitter(table):
    "A mouth that trembles by a pixel: only flicker sees it"
    t = table['jitter']
    assert t['flicker'] > 2 and t['flicker'] > 1.5*max(table[k]['flicker'] for k in ('blurred','static','swapped'))
    assert t['sharpness'] > .9 and t['mouth_corr'] > .9 and t['sync_acc'] > table['real']['sync_acc']-.15

def test_swapped(table):
    "Somebody else's sound under perfect pictures: only the scorer of sync sees it"
    t = table['swapped']
    assert t['sync_acc'] < table['real']['sync_acc']-.2 and t['lse_c'] < table['real']['lse_c']/2 and t['lse_d'] > table['real']['lse_d']
    assert t['psnr'] == 100 and t['ms_ssim'] == pytest.approx(1, abs=1e-4) and t['mouth_corr'] == pytest.approx(1) and t['flicker'] == pytest.approx(1)

def test_leak(held, scorer):
    "Other words are to be said. The copy of the source follows the source, one that says them does not"
    leaks,honest = [],[]
    for i,(s,_) in enumerate(held):
        o = held[(i+1)%len(held)][0]
        leaks.append(judge(s, swapped(s, o), scorer, same=False)['leak_swapped'])
        honest.append(judge(s, o, same=False)['leak_swapped'])
    assert min(leaks) > .99 and np.mean(np.abs(honest)) < .5

def test_offset(held, scorer):
    "The sound of a real clip moved by up to five frames: the offset is found exactly, and LSE-C falls with the shift"
    wrong,c = 0,{}
    for s,_ in held:
        for k in range(-5, 6):                                    # > 0: the sound runs ahead
            lo,hi = max(0,-k),len(s)-max(0,k)
            moved = Seen(s.crops[lo:hi], s.mel[4*(lo+k):4*(hi+k)], s.landmarks[lo:hi], s.valid[lo:hi])
            r = judge(moved, moved, scorer); wrong += r['offset'] != k
            c.setdefault(abs(k), []).append(r['lse_c'])
    assert wrong <= .05*11*len(held)
    means = [np.mean(c[k]) for k in range(6)]
    assert all(a > b for a,b in zip(means, means[1:]))

def test_missing(held, scorer):
    "Frames without a face, a cut and an early end of the sound are left out and counted"
    s,p = held[0]; n = len(s)
    lms = s.landmarks.copy(); lms[10:13] = np.nan
    valid = s.valid.copy(); valid[40:45] = False
    shot = (np.arange(n) >= 60).astype(np.int16)
    made = Seen(s.crops, s.mel, lms, valid, shot, heard=n-5); real = Seen(s.crops, s.mel, s.landmarks, valid, shot)
    r = judge(real, made, scorer, p)
    assert (r['psnr'].n, r['psnr'].dropped) == (n-5, 5)
    assert (r['flicker'].n, r['flicker'].dropped) == (n-1-6-1, 7)                 # 6 pairs touch the gap, one the cut
    assert r['mouth_corr'].dropped == 3
    t = scorer.t; runs = [40, 15, n-5-60]
    assert r['lse_c'].n == sum(m-t+1 for m in runs if m-t+1 > 15) and r['lse_c'].n + r['lse_c'].dropped == n-t+1
    nothing = Seen(s.crops, None, lms*np.nan, valid)
    r = judge(real, nothing, scorer, p)
    assert math.isnan(r['lse_c']) and math.isnan(r['mouth_corr']) and math.isnan(r['bilabial']) and r['psnr'] == 100
    assert set(r) <= set(METRICS)

# ---- files

SECONDS = 1.6

@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "A clip of 40 frames in a folder of its own, its frames and its sound"
    d = tmp_path_factory.mktemp('film'); src = sorted(sample_corpus().glob('*/*.mp4'))[0]
    frames = [f for _,f in read_frames(src, 25)][20:60]; wav = read_audio(src)[20*640:60*640]
    return write_video(d/'real.mp4', frames, audio=wav, crf=14), frames, wav, d

def adds_up(a):
    for k in ('real','made'): assert a[f'frames_{k}'] == a['compared'] + a['no_face_real'] + a[f'only_{k}']
    return a

def in_place(real, made):
    "Is every frame nearest to the one of its own moment?"
    def far(k): return np.abs(made.crops[2:-2].astype(int)-real.crops[2+k:len(real)-2+k]).mean()
    return min(range(-2, 3), key=far) == 0

@pytest.mark.parametrize('fps', [25, 30, 50, 'variable'])
def test_rates(film, fps):
    "Whatever the rate, frames are compared at the same moments"
    path,frames,wav,d = film
    if fps == 'variable':
        rng = np.random.default_rng(0); times = np.cumsum(np.r_[0, rng.uniform(.01, .035, 200)]); times = times[times < SECONDS-.02]
    else: times = np.arange(round(SECONDS*fps))/fps
    made = write_video(d/f'{fps}.mp4', [frames[min(int(round(t*25)), 39)] for t in times], fps=25 if fps == 'variable' else fps, times=times, audio=wav)
    r,m,a = see_pair(path, made); adds_up(a)
    assert abs(a['frames_made']-40) <= (0 if fps in (25,50) else 1) and a['compared'] >= 39
    assert in_place(r, m) and a['sound_match'] > .9

def test_spoilt(film):
    "Half the size, shorter, without a face for a while, with sound that ends early: all at once"
    path,frames,wav,d = film
    bad = [cv2.resize(f, (128,128), interpolation=cv2.INTER_AREA) for f in frames[:30]]
    for i in range(10, 18): bad[i] = np.full((128,128,3), 128, np.uint8)
    real = [f if i not in (25,26,27,28,29) else np.full_like(f, 90) for i,f in enumerate(frames)]
    r,m,a = see_pair(write_video(d/'gap.mp4', real, audio=wav), write_video(d/'bad.mp4', bad, audio=wav[:16*640])); adds_up(a)
    assert (a['frames_real'], a['frames_made'], a['only_real'], a['only_made']) == (40,30,10,0)
    assert (a['compared'], a['no_face_real'], a['no_face_made']) == (25,5,8)
    assert abs(a['heard']-16) <= 2                                               # AAC comes in blocks of 64 ms
    assert len(r) == len(m) == 30 and r.valid.sum() == 25 and np.isnan(m.opening[10:18]).all()
    for s in ('10 frames only in the real', 'no face in 5 frames of the real', 'no face in 8 frames of the made', '256×256 against 128×128', 'the sound ends after'): assert s in a['why']

def test_longer(film):
    "A made video that goes on, with a sound file of its own"
    path,frames,wav,d = film
    r,m,a = see_pair(path, write_video(d/'long.mp4', frames+frames[:10]), write_audio(d/'own.wav', np.r_[wav, wav]))
    adds_up(a); assert (a['only_made'], a['sound'], a['heard']) == (10,'file',40)
    assert np.array_equal(m.mel.shape, (160,80)) and '10 frames only in the made' in a['why']

def test_failures(film):
    "What cannot be judged is named with its reason, in its place, and the rest goes on"
    path,frames,wav,d = film
    grey = write_video(d/'grey.mp4', np.full((40,256,256,3), 128, np.uint8))
    write_video(d/'wide.mp4', [f[:128] for f in frames])
    (d/'torn.mp4').write_bytes(path.read_bytes()[:path.stat().st_size//3])
    (d/'noise.mp4').write_bytes(np.random.default_rng(0).bytes(5000))
    cv2.imwrite(str(d/'still.png'), frames[0])
    says = dict(good='', grey='no face was found in', wide='another shape', torn='breaks off', noise='cannot be read', still='is a picture', gone='does not exist')
    def pair(k): return Pair(k, 'p', path, path if k == 'good' else d/('still.png' if k == 'still' else f'{k}.mp4'))
    order = ['grey','wide','torn','good','noise','still','gone']
    done = list(judge_many([pair(k) for k in order], workers=0))
    assert [j.pair.name for j in done] == order
    for j in done:
        assert says[j.pair.name] in j.failed and bool(j.failed) == (j.pair.name != 'good') and '\n' not in j.failed
    good, = (j for j in done if not j.failed)
    assert good.rows['made']['psnr'] == 100 and good.account['why'] == ''           # a video against itself, to the last bit
    with pytest.raises(LipSyncError, match='no face was found'): see_pair(grey, path)

def test_in_order():
    "Results come in the order of the list, and a worker that dies costs its own item alone"
    out = list(in_order('subprocess:getoutput', [('sleep 1; echo a',), ('kill -9 $PPID',), ('echo c',), ('echo d',)], workers=2))
    assert [o if isinstance(o, str) else o.kind for o in out] == ['a','died','c','d']
    out = list(in_order('operator:truediv', [(1,2), (1,0)], workers=0))
    assert out[0] == .5 and isinstance(out[1], TaskError) and 'ZeroDivisionError' in out[1].why

def test_two_faces(tmp_path):
    "Of two people in the picture, the one who speaks is judged"
    a,b = (sorted((sample_corpus()/p).glob('*.mp4'))[0] for p in ('p0','p1'))
    two = [np.hstack([x,y]) for (_,x),(_,y) in zip(read_frames(a, 25), read_frames(b, 25))][:70]
    for wav,left in ((read_audio(a), True), (read_audio(b), False)):
        film = write_video(tmp_path/f'{left}.mp4', two, audio=wav)
        x = np.nanmedian(align_film(film, wav=wav)[0].lms[:,:,0])
        assert (x < 256) == left
