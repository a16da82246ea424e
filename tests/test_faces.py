"Whose mouth is dubbed, and where it is left alone, in films that are awkward"
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from lipsync_nb.core import FPS, SR, LipSyncError
from lipsync_nb.data.face import STABLE, FaceMesh, fit_similarity, patch_crop
from lipsync_nb.data.structure import find_clips
from lipsync_nb.demo import make_clip
from lipsync_nb.infer.faces import Scene, scout
from lipsync_nb.infer.persons import NOTE, Gallery, Notes, find_flaws, note_faces, take_look
from lipsync_nb.media import probe, read_audio, read_frames, save_image, write_video

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).parents[2]/'shared/data/real')
TEXTS = 'Maybe we will map a new way over the wide open bay.','Peter bought a big box of paper before the last shop closed.'

@pytest.fixture(scope='module')
def cast(tmp_path_factory):
    "Two people: their frames, what they say, and a folder"
    d = tmp_path_factory.mktemp('cast')
    paths = [make_clip(d/f'{p}.mp4', t, person=p) for p,t in zip((0,5), TEXTS)]
    frames = [[f for _,f in read_frames(o)] for o in paths]; n = min(map(len, frames))
    return [o[:n] for o in frames],[read_audio(o)[:n*SR//FPS] for o in paths],d

@pytest.fixture(scope='module')
def pair(cast):
    "Both beside each other; the right one is heard, and the left one is larger"
    (a,b),wavs,d = cast
    small = [cv2.copyMakeBorder(cv2.resize(f, (192,192), interpolation=cv2.INTER_AREA), 32, 32, 32, 32, cv2.BORDER_REPLICATE) for f in b]
    return write_video(d/'pair.mp4', (np.hstack(o) for o in zip(a, small)), audio=wavs[1])

def place(face): return 'left' if np.nanmedian([(.5-M[0,2])/M[0,0] for M in face.Ms]) < 256 else 'right'
def spans(face, why): return [i for i,w in enumerate(face.why) if w == why]

def test_two_faces(pair):
    s = scout(pair); n = len(s.times)
    left = s.choose('left')[0].person[0]
    assert len(s.persons) == 2 and left == 0
    got = {how: [place(f) for f in s.choose(how)] for how in ('largest','left','right','speaker',0,1,'1','all')}
    assert got == {'largest':['left'], 'left':['left'], 'right':['right'], 'speaker':['right'], 0:['left'], 1:['right'], '1':['right'], 'all':['left','right']}
    for f in s.choose('all'):
        assert np.mean([not w for w in f.why]) > .95 and not np.isnan(f.Ms).any() and f.outline.shape == (n,13,2) and 8 < len(f.seen) <= 64
        assert np.abs(f.outline - np.median(f.outline, 0)).max() < .2                            # the jaw stays where jaws are, in the crop
        assert (np.median(f.outline[...,1], 0) > .6).all()
    assert s.choose('speaker')[0].picks[0][2] == 'speaks'
    with pytest.raises(LipSyncError, match='no person 7; found were: 0 in .* frames'): s.choose(7)

def test_alternating_shots(cast):
    (a,b),wavs,d = cast
    s = scout(write_video(d/'turns.mp4', a[:30]+b[:20]+a[30:60]+b[20:45], audio=wavs[0]))
    assert s.cuts == {30,50,80} and [len(s.persons), *s.owner] == [2,0,1,0,1]
    first = set(range(30))|set(range(50,80))
    for how,want in (('largest',first), (0,first), (1,set(range(105))-first)):
        f, = s.choose(how)
        assert set(spans(f, '')) == want
        assert {i for i,*_ in f.seen} <= want and len({int(f.person[i]) for i,*_ in f.seen}) == 1  # never a picture of the other
        assert {i for i,M in enumerate(f.Ms) if not np.isnan(M).any()} == want                       # and nothing is bridged over a cut
    crops = [patch_crop(p, s.choose(1)[0].Ms[i], 48).mean((0,1)) for i,_,p in s.choose(1)[0].seen]
    assert all(c[0] > c[2] for c in crops)                                                         # the ochre collar, not the blue one

def test_leaves_and_returns(cast):
    (a,_),_,d = cast; empty = np.repeat(np.repeat(a[0][:1,:1], 256, 0), 256, 1)
    f, = scout(write_video(d/'away.mp4', [empty if 30 <= i < 42 or i == 60 else f for i,f in enumerate(a[:90])])).choose()
    gone = spans(f, 'no face found')
    assert gone == list(range(30,42)) and set(f.why) == {'','no face found'} and set(f.person[:30]) == set(f.person[42:]) == {0}

@pytest.mark.parametrize('kind', ['disc','bar'])
def test_covered(cast, kind):
    (a,_),_,d = cast
    def cover(f):
        f = f.copy()
        if kind == 'disc': cv2.circle(f, (128,164), 32, (128,128,128), -1)
        else: cv2.line(f, (118,168), (160,255), (35,33,38), 24); cv2.circle(f, (118,166), 18, (50,50,52), -1)
        return f
    f, = scout(write_video(d/'covered.mp4', [cover(f) if 40 <= i < 55 else f for i,f in enumerate(a[:90])])).choose()
    hidden = spans(f, 'mouth covered')
    assert abs(len(hidden)-15) <= 2 and set(hidden) <= set(range(39,56)) and len(hidden)+len(spans(f, '')) == 90
    assert not {i for i,*_ in f.seen} & set(hidden)

def test_turned_away():
    "The notes of a head that turns, with the landmarks of one"
    img = np.ascontiguousarray(astronaut()[:256,96:352])
    with FaceMesh(track=False) as mesh: l = mesh(img)
    look = take_look(img, fit_similarity(l[None,STABLE])[0]); n = 60
    lms = np.repeat(l[None], n, 0)
    at = slice(20,35); lms[at,1,0] += np.ptp(l[[33,263],0])*.9                                     # the nose goes out to the side
    notes = note_faces(np.arange(n), lms, [look]*n)
    why = find_flaws(notes, np.zeros(n, int), img.shape)
    assert why.tolist() == [4 if 20 <= i < 35 else 0 for i in range(n)] and (notes['yaw'][at] > 45).all()

def test_small_and_outside(cast):
    (a,_),_,d = cast
    tiny = [cv2.copyMakeBorder(cv2.resize(f, (44,44), interpolation=cv2.INTER_AREA), 10, 10, 10, 10, cv2.BORDER_REPLICATE) for f in a[:12]]
    with pytest.raises(LipSyncError, match=r'no face that can be dubbed \((face too small|no face found)'): scout(write_video(d/'tiny.mp4', tiny))
    cut = write_video(d/'cut.mp4', [f[:152] for f in a[:12]])
    with pytest.raises(LipSyncError, match='no face that can be dubbed'): scout(cut)

def test_fixed_size(cast):
    "What grows with the film is a note a face and frame; pictures do not grow"
    assert NOTE.itemsize <= 500
    (a,_),_,_ = cast
    with FaceMesh(track=False) as mesh: l = mesh(a[0])
    notes = Notes()
    for i in range(1000): notes.add(i, l, np.zeros((10,10,3), np.uint8))
    notes.all(); assert len(notes.buf) == 1000*NOTE.itemsize and not notes.wait
    g = Gallery(budget=2e6); img = np.zeros((120,120,3), np.uint8)
    for i in range(45_000): g.offer(i//300, lambda: (i, i, (img, None)))
    assert g.size <= 2e6 and len({i//300 for _,i,_ in g.items()}) > 20

def test_saved(pair, cast):
    d = cast[2]; s = scout(pair); s.save(d/'s.npz'); t = Scene.load(d/'s.npz', pair)
    for how in ('largest','speaker',1):
        x,y = s.choose(how)[0],t.choose(how)[0]
        assert (x.why, x.cuts, x.picks) == (y.why, y.cuts, y.picks)
        for k in ('Ms','person','outline','opening'): assert np.array_equal(getattr(x, k), getattr(y, k), equal_nan=True)
        assert all(i == j and o == q and np.array_equal(p[0], r[0]) and np.array_equal(p[1], r[1]) for (i,o,p),(j,q,r) in zip(x.seen, y.seen))
    (d/'bad.npz').write_bytes(b'not a zip')
    with pytest.raises(LipSyncError, match='scout the film again'): Scene.load(d/'bad.npz', pair)
    with pytest.raises(LipSyncError, match='cannot write'): s.save(pair/'below'/'s.npz')

def test_still(cast):
    (a,b),_,d = cast; save_image(d/'two.png', np.hstack([a[0], b[0]]))
    s = scout(d/'two.png')
    assert [place(f) for f in s.choose('all')] == ['left','right'] and s.seconds == 1/FPS
    with pytest.raises(LipSyncError): s.choose('speaker')

@pytest.mark.skipif(not REAL.is_dir(), reason='no real clips: LIPSYNC_REAL_DATA names no folder')
def test_real_clips():
    "People who speak towards a camera are one person each, seen almost throughout, hardly ever flagged"
    persons = {}
    for c in find_clips(REAL): persons.setdefault(c.person, c)
    short = [c.path for c in persons.values() if 1 <= probe(c.path).duration <= 4]
    frames = dubbed = flagged = single = 0
    for p in short[::max(len(short)//8, 1)][:8]:
        s = scout(p); f, = s.choose(); frames += len(f.why); dubbed += len(spans(f, ''))
        flagged += len(spans(f, 'mouth covered')) + len(spans(f, 'turned away')); single += len(s.persons) == 1
    assert dubbed/frames > .95 and flagged/frames < .02 and single >= 7
