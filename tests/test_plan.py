"The memory that `--dry_run` announces is about what a run takes"
import json, os, subprocess, sys
import pytest

# A short real run of one stage: the memory that its process has at its peak beyond what it had before, and what was announced
RUN = '''
import json, sys, tempfile
from dataclasses import replace
import torch
from lipsync_nb.data.loaders import ClipStore
from lipsync_nb.models.syncnet import SyncNet
from lipsync_nb.sample import sample_data
from lipsync_nb.train.config import RUNS
from lipsync_nb.train.learner import Run
from lipsync_nb.train.plan import measure
torch.set_num_threads(1)
def now(key): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key))
data,(preset,stage,bs) = [ClipStore(sample_data(), s) for s in ('train','valid')],sys.argv[1:]
cfg = RUNS[preset]; s = next(s for s in cfg.stages if s.name == stage)
cfg = replace(cfg, stages=(replace(s, steps=3, bs=int(bs) or s.bs, warm=0, ramp=0),), epoch=10, valid=1, workers=0)
before = now('VmRSS:'); open('/proc/self/clear_refs', 'w').write('5')        # the peak is counted from here
with tempfile.TemporaryDirectory() as d: Run(*data, d, cfg, SyncNet.from_preset(preset)).fit()
peak = now('VmHWM:')-before
print(json.dumps(dict(peak=peak, announced=measure(cfg)[0].bytes)))
'''

@pytest.mark.parametrize('stage,bs', [('listen',0), ('coarse',0), ('full',0), ('full',12)])
def test_announced_memory_is_about_what_is_taken(root, stage, bs):
    if not os.access('/proc/self/clear_refs', os.W_OK): pytest.skip('this system does not count the peak of a process from a moment on')
    r = subprocess.run([sys.executable, '-c', RUN, 'demo', stage, str(bs)], cwd=root, capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', 'LIPSYNC_QUIET': '1'})
    assert r.returncode == 0, r.stderr
    o = json.loads(r.stdout.splitlines()[-1])
    assert .7 <= o['announced']/o['peak'] <= 1.5, {k: f'{v/2**20:.0f} MB' for k,v in o.items()}
