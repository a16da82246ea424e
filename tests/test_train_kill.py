"Kill -9 at any moment of a training, over all stages: the same command goes on, and ends with the same bits as a run that was left alone"
import os, subprocess, sys

# Torch is loaded once; each trainer is a fork that trains until it is killed, and the last one until it is done
TRAIN = '''
import os, random, signal, sys, time
os.environ['LIPSYNC_QUIET'] = '1'
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import load_file
from lipsync_nb.data.loaders import ClipStore
from lipsync_nb.models.syncnet import SyncNet
from lipsync_nb.sample import sample_data
from lipsync_nb.train.config import RUNS
from lipsync_nb.train.learner import Run
from lipsync_nb.train.log import read_log
torch.set_num_threads(1)                     # no pool of threads, so that forks are safe
folder,kills,seed = Path(sys.argv[1]),int(sys.argv[2]),int(sys.argv[3])
train,valid = ClipStore(sample_data(), 'train'),ClipStore(sample_data(), 'valid')
stages = tuple(replace(s, steps=n, bs=2, warm=2*(s.name == 'full'), ramp=s.ramp and 3) for s,n in zip(RUNS['demo'].stages, (12, 12, 6, 8)))
cfg = replace(RUNS['demo'], stages=stages, epoch=6, save=2, valid=1, ema=.9)

def fit(name):
    torch.manual_seed(0)
    run = Run(train, valid, folder/name, cfg, SyncNet.from_preset('demo'))
    return run, run.fit()

def tell(name): return [{k: v for k,v in r.items() if k not in ('time','wait','rate')} for r in read_log(folder/name)]

start = time.perf_counter(); run,path = fit('alone'); length = time.perf_counter()-start
rng,done,at = random.Random(seed),0,[]
while done < kills:
    if not (pid := os.fork()):
        try: fit('killed')
        finally: os._exit(1)
    time.sleep(rng.uniform(.1, .5)*length); os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0); done += 1
    if (folder/'killed/log.jsonl').exists() and (rows := read_log(folder/'killed')): at.append((rows[-1]['stage'], rows[-1]['step']))
    if (folder/'killed/final.safetensors').exists(): (folder/'killed').rename(folder/f'done{done}')  # it got through: kill another one
again,last = fit('killed')
for name in ('gen', 'critic', 'ema'):
    for p,q in zip(getattr(run, name).parameters(), getattr(again, name).parameters()): assert torch.equal(p, q), name
for o in (last, *(p/'final.safetensors' for p in folder.glob('done*'))):
    a,b = load_file(path),load_file(o)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), o
assert tell('alone') == tell('killed') and len(tell('alone')) > 10, [(x, y) for x,y in zip(tell('alone'), tell('killed')) if x != y][:2]
print('kills survived', kills, 'at', at)
'''

def test_killed_at_any_moment(root, tmp_path):
    r = subprocess.run([sys.executable, '-c', TRAIN, str(tmp_path), '3', '0'], cwd=root, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=600)
    assert r.returncode == 0, r.stderr
    assert 'kills survived 3' in r.stdout
