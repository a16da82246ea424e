"A run that goes wrong notices within 20 steps, goes back to its last healthy checkpoint at a lower rate, and comes through"
import os, shutil, subprocess, sys
from dataclasses import replace
import pytest, torch
from fastai.callback.core import Callback

AT = 26 # the step at which something goes wrong

@pytest.fixture(scope='module')
def data():
    from lipsync_nb.data.loaders import ClipStore
    from lipsync_nb.sample import sample_data
    os.environ['LIPSYNC_QUIET'] = '1'; torch.set_num_threads(1)
    return ClipStore(sample_data(), 'train'),ClipStore(sample_data(), 'valid')

class Harm(Callback):
    "Do something bad to the run, the first time that it comes by"
    order = 50
    def __init__(self, run, do): self.owner,self.do = run,do
    def before_batch(self):
        if self.training and self.owner.turn == 0 and self.loss_func.step >= AT: self.do(self.owner, self.learn)

def nan(run, learn):
    if learn.loss_func.step == AT: next(run.gen.decoder.parameters()).data.fill_(torch.nan)
def explode(run, learn): learn.opt.set_hyper('lr', 1.)
def dies(run, learn):
    for p in run.critic.parameters(): p.data.zero_()

@pytest.mark.parametrize('do,stage,kind', [(nan, 1, 'nan'), (explode, 1, 'diverged'), (dies, 3, 'critic dead')])
def test_fault_is_seen_rolled_back_and_survived(data, tmp_path, do, stage, kind):
    from lipsync_nb.models.syncnet import SyncNet
    from lipsync_nb.train.config import RUNS
    from lipsync_nb.train.learner import Run
    from lipsync_nb.train.log import read_log
    s = replace(RUNS['demo'].stages[stage], steps=48, bs=2, warm=0, ramp=0, t=1 if stage == 1 else 5)
    cfg = replace(RUNS['demo'], stages=(s,), epoch=12, valid=1, watch=1)
    run = Run(*data, tmp_path/'run', cfg, SyncNet.from_preset('demo'))
    learner,seen = run.learner,[]
    run.learner = lambda i, cbs=(): learner(i, [*cbs, Harm(run, do)])
    back = run._back
    def watched(verdict, log): seen.append(verdict); return back(verdict, log)
    run._back = watched
    final = run.fit()
    assert [v.kind for v in seen] == [kind], [v.sentence for v in seen]
    events = [r for r in read_log(tmp_path/'run') if 'back_to' in r]
    assert len(events) == 1 and events[0]['event'] == seen[0].sentence and events[0]['back_to'] in (12, 24)  # a checkpoint from before it
    step = int(seen[0].sentence.split(':')[0].split()[1])
    assert AT < step <= AT+20, seen[0].sentence
    assert run.monitor.scale == cfg.monitor.factor                                                         # at a lower rate from there
    assert final.exists() and all(p.isfinite().all() for p in run.gen.parameters())
    rates = [r['lr'] for r in read_log(tmp_path/'run') if 'lr' in r and r['step'] > 36]
    assert max(rates) < s.lr

def test_a_fault_that_stays_ends_the_run(data, tmp_path):
    "After as many attempts as the monitor allows, in a sentence"
    from lipsync_nb.core import LipSyncError
    from lipsync_nb.train.config import RUNS
    from lipsync_nb.train.learner import Run
    s = replace(RUNS['demo'].stages[0], steps=12, bs=2)
    run = Run(*data, tmp_path/'run', replace(RUNS['demo'], stages=(s,), epoch=6, valid=1, watch=1))
    learner = run.learner
    class Poison(Callback):
        order = 50
        def before_batch(self):
            if self.loss_func.step == 8: next(run.gen.audio.parameters()).data.fill_(torch.nan)
    run.learner = lambda i, cbs=(): learner(i, [*cbs, Poison()])
    with pytest.raises(LipSyncError, match='did not help, so the run stops here'): run.fit()
    assert run.ckpt.latest()

def limited(n):
    "Files of this process may have `n` bytes: a disk that is full in the midst of a write, as root too"
    import resource
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

def test_full_disk_is_one_sentence_and_nothing_is_lost(root, tmp_path):
    "The first checkpoint fits, a later one with its optimizer does not; with room again the same command goes on"
    from lipsync_nb.sample import sample_data, sample_expert
    from lipsync_nb.train.log import read_log
    cmd = [sys.executable, '-m', 'lipsync_nb.train.launch', '--data_dir', str(sample_data()), '--checkpoint_dir', str(tmp_path/'run'), '--preset', 'demo', '--expert', str(sample_expert()), '--batch_size', '2', '--steps', '14', '--set', 'valid=1']
    def train(**kw): return subprocess.run(cmd, cwd=root, capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', 'LIPSYNC_QUIET': '1'}, **kw)
    r = train(preexec_fn=limited(9_000_000))
    assert r.returncode == 2, r.stderr
    said = r.stderr.strip().splitlines()
    assert len(said) == 1 and 'cannot write' in said[0] and said[0].endswith('what was there before is untouched'), r.stderr
    assert 'Exception occured' not in r.stderr and 'Traceback' not in r.stderr
    step = max(int(p.name.removeprefix('step-')) for p in (tmp_path/'run'/'checkpoints').glob('step-*'))
    r = train()
    assert r.returncode == 0 and (tmp_path/'run'/'final.safetensors').exists(), r.stderr
    steps = [o['step'] for o in read_log(tmp_path/'run') if 'loss' in o]
    assert len(steps) == len(set(steps)) and step in (0, *steps), (step, steps)

@pytest.mark.parametrize('what', ['checkpoint', 'log'])
def test_full_disk_ends_an_expert_in_one_sentence(data, tmp_path, monkeypatch, what):
    from lipsync_nb.core import LipSyncError
    from lipsync_nb.train import log as module
    from lipsync_nb.train.syncnet import EXPERTS, fit_expert
    class Full:
        def write(self, b): return 0
        def close(self): pass
    if what == 'checkpoint': monkeypatch.setattr(shutil, 'disk_usage', lambda p, real=shutil.disk_usage: real(p)._replace(free=1000))
    else: monkeypatch.setattr(module, 'open', lambda *_, **__: Full(), raising=False)
    with pytest.raises(LipSyncError) as e: fit_expert(*data, tmp_path/'expert', replace(EXPERTS['demo'], steps=1, epoch=1, groups=2, per_clip=2, judged=8))
    assert str(e.value).startswith('no room for a checkpoint in' if what == 'checkpoint' else 'cannot write '), e.value
    assert '\n' not in str(e.value)
