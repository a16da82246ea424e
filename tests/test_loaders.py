"Batches over processes: forked or started anew, in any number, they give the same, and share the one cache"
import sys
import numpy as np
import pytest
import torch

from lipsync_nb.core import save_json
from lipsync_nb.data.batches import GenBatches, ListenBatches, StepLoader, SyncBatches
from lipsync_nb.data.folder import FOLDER_SCHEMA, CropWriter
from lipsync_nb.data.index import build_index
from lipsync_nb.data.loaders import ClipStore

CONTEXTS = ['spawn'] if sys.platform == 'win32' else ['fork', 'spawn']

def write_clip(out, person, name, n, rng):
    "A prepared clip of noise: a cut in the middle, and a frame that cannot be used"
    f = out/person/name; f.mkdir(parents=True)
    w = CropWriter(f/'crops.avi', 32)
    for c in rng.integers(0, 255, (n,32,32,3), np.uint8): w.add(c)
    valid,shot = np.ones(n, bool),(np.arange(n) >= n//2).astype(np.int16); valid[n//4] = False
    np.save(f/'mel.npy', rng.uniform(-1, 1, (4*n,80)).astype(np.float16))
    np.savez(f/'track.npz', offsets=w.close(), valid=valid, shot=shot, shape=rng.random((n,3), np.float32))
    save_json(dict(schema=FOLDER_SCHEMA, status='accepted', person=person, clip=name, config_hash='c', n_frames=n, n_valid=int(valid.sum()),
                   source=dict(path=f'{person}/{name}.mp4', hash=person+name), quality={}), f/'meta.json')

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    out,rng = tmp_path_factory.mktemp('prepared'),np.random.default_rng(0)
    for p in ('ann', 'bob'):
        for i in range(4): write_clip(out, p, f'c{i}', 60+7*i, rng)
    build_index(out, by='source', valid=.25, test=.25)
    return out

def same(a, b):
    a,b = list(a),list(b)
    assert len(a) == len(b)
    for x,y in zip(a, b):
        for u,v in zip(x, y, strict=True): torch.testing.assert_close(u, v, rtol=0, atol=0, equal_nan=True)

def epochs(dl, which=(0,1)):
    for dl.epoch in which: yield from dl

@pytest.mark.parametrize('cache', [True, False])
@pytest.mark.parametrize('kind', [GenBatches, SyncBatches, ListenBatches])
def test_workers_give_the_same(prepared, kind, cache):
    fn = kind(ClipStore(prepared, cache=cache), 5)
    same(epochs(StepLoader(fn, 3)), epochs(StepLoader(fn, 3, workers=2)))

def test_workers_that_start_anew(prepared):
    for cache in (True, False):
        gb = GenBatches(ClipStore(prepared, cache=cache), t=5, bs=4, refs=2)
        same(epochs(StepLoader(gb, 3)), epochs(StepLoader(gb, 3, workers=1, context='spawn')))

def test_an_epoch_can_be_taken_up_in_its_middle(prepared):
    gb = GenBatches(ClipStore(prepared), t=5, bs=4)
    whole = list(epochs(StepLoader(gb, 5)))
    for workers in (0,2): same(whole[8:], epochs(StepLoader(gb, 5, workers=workers, start=3), (1,)))
    dl = StepLoader(gb, 5, workers=2, start=3); list(epochs(dl, (0,)))
    same(whole[5:], epochs(dl, (1,)))                       # the next epoch is whole again

class Where:
    "Tells from within a worker whether the cache is in shared memory, and by how much reading all of it makes the worker's own memory grow"
    def __init__(self, store): self.store = store
    def finish(self, raw, device): return raw
    def raw(self, i):
        def own(): return sum(int(l.split()[1])*1024 for l in open('/proc/self/smaps_rollup') if l.startswith('Private_'))
        before = own(); total = sum(int(c.crops.sum(dtype=np.int64)) for c in self.store)
        return torch.tensor([own()-before, self.store.px.is_shared(), self.store[0].px.is_shared(), total])

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('context', CONTEXTS)
def test_the_cache_is_not_copied(prepared, context):
    store = ClipStore(prepared, cache=True)
    store.clips = store.clips*200; store.first = np.r_[0, np.cumsum([len(c) for c in store])]
    store.px = store.px.repeat(200,1,1,1); store._share()   # so large that a copy would show
    want = sum(int(c.crops.sum(dtype=np.int64)) for c in store)
    [(grown,shared,slice_shared,total)] = [o.tolist() for o in StepLoader(Where(store), 1, workers=1, context=context)]
    assert total == want and grown < store.px.numel()/4
    assert (shared,slice_shared) == ((1,1) if context == 'spawn' else (0,0))
