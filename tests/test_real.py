"Real talking-face clips, where there are any: set LIPSYNC_REAL_DATA, or put them beside the checkout as shared/data/real"
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lipsync_nb.core import load_json
from lipsync_nb.data.preprocess import preprocess
from lipsync_nb.data.structure import find_clips
from lipsync_nb.infer.core import LipSync, scout
from lipsync_nb.infer.paste import paste_box
from lipsync_nb.media import probe, read_frames
from lipsync_nb.models.generator import Generator

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).parents[2]/'shared/data/real')
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason='no real clips: LIPSYNC_REAL_DATA names no folder')

def pick(n, least=1., most=8.):
    "One clip each of `n` persons, spread over the collection"
    persons = {}
    for c in find_clips(REAL): persons.setdefault(c.person, c)
    short = [c for c in persons.values() if least <= probe(c.path).duration <= most]
    return [short[i] for i in np.linspace(0, len(short)-1, n).round().astype(int)]

def test_preprocess(tmp_path):
    "Every clip is accepted, or rejected with a reason; accepted ones show a face"
    for c in pick(8):
        (tmp_path/'raw'/c.person).mkdir(parents=True, exist_ok=True)
        (tmp_path/'raw'/c.person/c.path.name).symlink_to(c.path.resolve())
    s = preprocess(tmp_path/'raw', tmp_path/'out')
    metas = [load_json(p) for p in (tmp_path/'out').glob('*/*/meta.json')]
    assert len(metas) == s['clips'] == 8 and s['accepted'] >= 6
    for m in metas:
        if m['status'] == 'accepted': assert m['quality']['face_share'] >= .95
        else: assert m['reason']

def test_dub(tmp_path):
    "Same frames at the same times, and nothing changed outside the pasted region but by encoding"
    clip = pick(12, 2., 6.)[5].path
    torch.manual_seed(0)
    lip,out = LipSync(gen=Generator.from_preset('demo')),tmp_path/'out.mp4'
    scene = scout(clip, lip.size)
    lip.dub(scene, clip, out)
    a,b = list(read_frames(clip)),list(read_frames(out))
    assert len(a) == len(b)
    np.testing.assert_allclose([t for t,_ in a], [t for t,_ in b], atol=1e-6)
    assert abs(probe(out).duration - probe(clip).duration) < .05
    face, = scene.choose('largest'); err,n = 0.,0
    for (_,x),(_,y),M in zip(a, b, face.Ms):
        outside = np.ones(x.shape[:2], bool); t,b_,l,r = paste_box(M, x.shape, lip.size); outside[t:b_,l:r] = False
        err += ((x[outside].astype(float)-y[outside])**2).sum(); n += outside.sum()*3
    assert 10*np.log10(255**2/(err/n)) >= 40
