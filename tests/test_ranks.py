"Two ranks train as one: the same weights as one process with twice the batch, the same bits on both, and no waiting for the dead"
import os, signal, socket, subprocess, sys, time
import pytest, torch

# A run's stage on the sample's clips, on as many ranks as the environment says; what it ends with goes to a file
RUN = '''
import os, sys
os.environ['LIPSYNC_QUIET'] = '1'
from dataclasses import replace
from pathlib import Path
import torch
from fastai.callback.core import Callback
from lipsync_nb.core import LipSyncError
from lipsync_nb.data.loaders import ClipStore
from lipsync_nb.models.syncnet import SyncNet
from lipsync_nb.sample import sample_data
from lipsync_nb.train.config import RUNS
from lipsync_nb.train.learner import Run
from lipsync_nb.train.ranks import connect, rank, world
torch.set_num_threads(1)
out,bs,steps,wait = Path(sys.argv[1]),int(sys.argv[2]),int(sys.argv[3]),float(sys.argv[4])
acc = connect(wait)
train,valid = ClipStore(sample_data(), 'train'),ClipStore(sample_data(), 'valid')

class Tick(Callback):
    order = 99
    def after_batch(self):
        if self.training: (out/f'at-{rank()}').write_text(str(self.loss_func.step))

def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])

def go(name, lr, **opts):
    "The full stage with its penalty, from the same weights"
    full = replace(RUNS['demo'].stages[3], steps=steps, bs=bs, warm=0, ramp=0, t=5, gp_every=2, lr=lr)
    torch.manual_seed(0)
    run = Run(train, valid, out/name, replace(RUNS['demo'], stages=(full,), epoch=steps, valid=1, watch=2), SyncNet.from_preset('demo'), acc=acc)
    for k,v in opts.items(): setattr(run, k, v)
    learner,start = run.learner,flat(run.gen)
    run.learner = lambda i, cbs=(): learner(i, [*cbs, Tick()])
    run.fit()
    torch.save(dict(gen=flat(run.gen), critic=flat(run.critic), start=start), out/f'{name}-{rank()}.pt')

try:
    go('plain', .03, gen_opt=torch.optim.SGD, critic_opt=lambda ps, lr: torch.optim.SGD(ps, .1))
    go('adam', 3e-4)
except LipSyncError as e: print(e, file=sys.stderr); sys.stderr.flush(); os._exit(2)
'''

def spawn(root, out, n, bs, steps=5, wait=120):
    "As many processes as ranks, as `torchrun` would start them, on a port that is free"
    out.mkdir(exist_ok=True)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    base = {**os.environ, 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'ACCELERATE_USE_CPU': 'true', 'GLOO_SOCKET_IFNAME': 'lo'}
    def env(r): return {**base, 'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n), 'RANK': str(r), 'LOCAL_RANK': str(r)} if n > 1 else base
    return [subprocess.Popen([sys.executable, '-c', RUN, str(out), str(bs), str(steps), str(wait)], cwd=root, env=env(r), stderr=subprocess.PIPE, text=True) for r in range(n)]

def finish(ps):
    "Wait for all; their messages if all went well"
    out = [p.communicate(timeout=300)[1] for p in ps]
    assert all(p.returncode == 0 for p in ps), '\n'.join(out)

@pytest.fixture(scope='module')
def ended(root, tmp_path_factory):
    "The folders of one process and of two ranks"
    d = tmp_path_factory.mktemp('ranks')
    finish(spawn(root, d/'one', 1, 4)); finish(spawn(root, d/'two', 2, 2))
    return d

def weights(d, name): return [torch.load(d/o, weights_only=True) for o in (f'one/{name}-0.pt', f'two/{name}-0.pt', f'two/{name}-1.pt')]
def gap(a, b): return torch.cat([(a[k]-b[k]).abs() for k in ('gen', 'critic')])

def test_two_ranks_equal_one_with_twice_the_batch(ended):
    """By plain gradient descent, whose steps are the gradients: full stage with its penalty, five steps. They are small ones, since L1 has a
    kink: a pixel that is painted right to within rounding pulls this way in one run and that way in the other, which alone moves a weight by rate·10⁻⁵"""
    one,a,b = weights(ended, 'plain')
    assert gap(a, b).max() == 0                                 # ranks are the same to the last bit
    moved = one['gen']-one['start']; assert moved.abs().max() > 1e-3 # there is something to compare
    assert gap(one, a).max() < 1e-6, gap(one, a).max()
    assert (one['gen']-a['gen']).norm() < 1e-3*moved.norm(), ((one['gen']-a['gen']).norm(), moved.norm())

def test_with_adam_only_rounding_differs(ended):
    "Adam divides a gradient by its size, so where one is nothing but rounding (the last bias of a Wasserstein critic cancels), its steps are rounding, too"
    one,a,b = weights(ended, 'adam')
    assert gap(a, b).max() == 0 and (one['gen']-one['start']).abs().max() > 1e-4
    δ = gap(one, a); assert (δ < 1e-6).float().mean() > .99 and δ.max() < 1e-3, ((δ < 1e-6).float().mean(), δ.max())

def test_figures_are_of_the_whole_batch_and_written_once(ended):
    from lipsync_nb.train.log import read_log
    one,two = ([r for r in read_log(ended/o/'plain') if 'event' not in r] for o in ('one', 'two'))
    assert [(r['step'], r['stage']) for r in one] == [(r['step'], r['stage']) for r in two]
    for x,y in zip(one, two):
        for k in x.keys() - {'time', 'stage', 'wait', 'rate'}: assert abs(x[k]-y[k]) < 1e-4*max(1, abs(x[k])) or 'leak' in k, (k, x[k], y[k]) # sounds are swapped within a rank

def until(ok, seconds=120):
    "Wait until something is so"
    end = time.time()+seconds
    while not ok():
        assert time.time() < end, 'it did not come so far'
        time.sleep(.1)

@pytest.mark.parametrize('how', ['killed', 'hangs'])
def test_the_others_stop_when_one_is_lost(root, tmp_path, how):
    "Rank 1 is killed, or stopped so that it never answers: rank 0 says so in a sentence and ends, and its checkpoint is whole"
    from lipsync_nb.train.checkpoint import CheckpointStore
    ps = spawn(root, tmp_path/'two', 2, 2, steps=500, wait=20)
    try:
        until(lambda: (tmp_path/'two/at-1').exists() and int((tmp_path/'two/at-1').read_text() or 0) >= 2 or ps[0].poll() is not None)
        start = time.time(); ps[1].send_signal(signal.SIGKILL if how == 'killed' else signal.SIGSTOP)
        err = ps[0].communicate(timeout=120)[1]
    finally:
        for p in ps: p.kill()
    assert ps[0].returncode == 2 and 'rank 0 of 2 has lost another rank' in err.splitlines()[-1], err
    assert 'Traceback' not in err and time.time()-start < 90
    assert CheckpointStore(tmp_path/'two/plain/checkpoints').latest()
