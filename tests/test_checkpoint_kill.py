"Kill -9 at any moment leaves a store of checkpoints with a good one, and a log that goes on"
import os, subprocess, sys
import pytest

# Torch is loaded once; each writer is a fork that saves as fast as it can until it is killed, and is then judged
KILLS = '''
import os, random, signal, sys, time
from pathlib import Path
import torch
from lipsync_nb.models.syncnet import SyncNet
from lipsync_nb.train.checkpoint import CheckpointStore, rng_state
from lipsync_nb.train.log import RunLog, read_log
torch.set_num_threads(1)                     # no pool of threads, so that forks are safe
folder,kills = Path(sys.argv[1]),int(sys.argv[2])

def write(say):
    store,net,step = CheckpointStore(folder/'checkpoints', keep=2),SyncNet.from_preset('demo'),0
    if store.latest(): step,state = store.load(dict(expert=net)); torch.set_rng_state(state['rng']['torch'])
    log = RunLog(folder, resume=step)
    while True:
        step += 1
        with torch.no_grad():
            for p in net.parameters(): p.fill_(step)
        log.log(step, 'coarse', loss=torch.rand(()))
        store.save(step, dict(expert=net), dict(step=step, big=torch.full((200_000,), float(step)), rng=rng_state()), tags=['tenth'] if step%10==0 else [])
        os.write(say, f'{step},'.encode())

def run_and_kill(seconds):
    "Steps that a writer called done before it was killed, `seconds` after its first"
    hear,say = os.pipe()
    if not (pid := os.fork()):
        try: write(say)
        finally: os._exit(1)
    os.close(say)
    said = os.read(hear, 1000)
    time.sleep(seconds); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    while more := os.read(hear, 1000): said += more
    os.close(hear)
    return [int(o) for o in said.decode().split(',')[:-1]]

store,net,rng,last = CheckpointStore(folder/'checkpoints'),SyncNet.from_preset('demo'),random.Random(0),0
for _ in range(kills):
    done = run_and_kill(rng.uniform(0, .2))
    step,state = store.load(dict(expert=net))
    assert done and done[0] == last+1, (done, last)                      # it went on from the newest
    assert done[-1] <= step <= done[-1]+1, (done, step)                  # what it called done is there, or the one after
    assert state['step'] == step and (state['big'] == step).all() and all((p == step).all() for p in net.parameters()) # of one piece
    steps = [r['step'] for r in read_log(folder)]
    assert steps == list(range(1, len(steps)+1)) and step <= len(steps) <= step+1, (steps, step)
    last = step
store.clean()
left = sorted(p.name for p in (folder/'checkpoints').iterdir())
assert left == sorted(p.name for p in store.all()) and 1 <= len(left) <= 3, left  # the two newest, the last tenth, no litter
print('kills survived', kills, 'steps', last)
'''

def test_kill_at_any_moment(root, tmp_path):
    r = subprocess.run([sys.executable, '-c', KILLS, str(tmp_path), '20'], cwd=root, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=300)
    assert r.returncode == 0, r.stderr
    assert 'kills survived 20' in r.stdout

# A limit on the size of files is a full disk in the midst of a write, as root too; a small tmpfs is the real thing where it can be mounted
FULL = '''
import resource, shutil, sys
from pathlib import Path
import torch
from lipsync_nb.core import LipSyncError
from lipsync_nb.train.checkpoint import CheckpointStore
from lipsync_nb.models.syncnet import SyncNet
torch.set_num_threads(1)
folder,how = Path(sys.argv[1]),sys.argv[2]
store,net = CheckpointStore(folder/'checkpoints', keep=1),SyncNet.from_preset('demo')
def save(step, n): return store.save(step, dict(expert=net), dict(step=step, big=torch.zeros(n)))
save(1, 10)
if how=='limit':
    for limit in (100, 5_000, 50_000, 500_000):          # in the manifest, the state, the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try: save(2, 200_000); raise AssertionError('nothing said')
        except LipSyncError as e: print(e)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert store.load(dict(expert=net))[0] == 1 and len(list(store.folder.iterdir())) == 1, list(store.folder.iterdir())
else:
    real = shutil.disk_usage                             # what is asked beforehand may be wrong by the time of the write
    for told in (True, False):
        if not told: shutil.disk_usage = lambda p: real('/')._replace(free=2**60)
        try: save(2, 4_000_000); raise AssertionError('nothing said')
        except LipSyncError as e: print(e)
        assert store.load(dict(expert=net))[0] == 1 and len(list(store.folder.iterdir())) == 1, list(store.folder.iterdir())
save(3, 10); assert store.load(dict(expert=net))[0] == 3 # room again: all goes on
'''

def full(root, folder, how):
    r = subprocess.run([sys.executable, '-c', FULL, str(folder), how], cwd=root, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)
    assert r.returncode == 0, r.stderr
    return r.stdout.splitlines()

def test_disk_full_in_the_midst(root, tmp_path):
    said = full(root, tmp_path, 'limit')
    assert len(said) == 4 and all(o.startswith('cannot write ') and o.endswith('what was there before is untouched') for o in said), said

def test_disk_really_full(root, tmp_path):
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', str(tmp_path)], capture_output=True).returncode: pytest.skip('no small disk can be mounted here')
    try: said = full(root, tmp_path, 'tmpfs')
    finally: subprocess.run(['umount', '-l', str(tmp_path)], check=True)
    assert len(said) == 2 and said[0].startswith('no room for a checkpoint') and said[1].startswith('cannot write'), said
