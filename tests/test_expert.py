"The expert's training: two ranks equal one, a kill at any moment changes nothing, and the command on two ranks"
import os, random, signal, subprocess, sys, time
import pytest

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'LIPSYNC_QUIET': '1', 'GLOO_SOCKET_IFNAME': 'lo'}

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A small prepared collection"
    from lipsync_nb.data.index import build_index
    from lipsync_nb.data.preprocess import preprocess
    from lipsync_nb.demo import make_corpus
    d = tmp_path_factory.mktemp('expert')
    make_corpus(d/'raw', n_persons=2, n_clips=5, workers=1)
    preprocess(d/'raw', d/'proc', workers=1)
    build_index(d/'proc', by='source', valid=.2, test=.2)
    return d/'proc'

# Plain gradient descent, so that a difference in the gradient stays one of its size in the weights
STEPS = '''
import sys, torch
from torch import nn
from lipsync_nb.data.loaders import ClipStore
from lipsync_nb.models.syncnet import SyncNet
from lipsync_nb.train.contrast import ContrastLoss, ExpertBatches, ExpertStep
from lipsync_nb.train.ranks import AccelerateCallback, connect, rank, world
torch.set_num_threads(1); acc = connect(cpu=True); torch.manual_seed(0)
net = ExpertStep(SyncNet.from_preset('demo')); model = AccelerateCallback(acc).wrap(net) if acc else net
opt,fn = torch.optim.SGD(net.parameters(), .001),ContrastLoss()
batches = ExpertBatches(ClipStore(sys.argv[1], 'train'), 5, 4//world(), 8, rank=rank(), world=world())
start,losses = [p.detach().clone() for p in net.parameters()],[]
for i in range(5):
    b = batches(i); loss = fn(model(*b[:3]), *b[3:])
    opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
moved = max((p-q).abs().max().item() for p,q in zip(net.parameters(), start))
torch.save(dict(state=net.net.state_dict(), losses=losses, moved=moved, world=world()), f'{sys.argv[2]}-{rank()}.pt')
'''

def test_two_ranks_equal_one(root, data, tmp_path):
    import torch
    (tmp_path/'steps.py').write_text(STEPS)
    for n,how in ((1, [sys.executable]), (2, [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'])):
        r = subprocess.run([*how, str(tmp_path/'steps.py'), str(data), str(tmp_path/f'{n}')], cwd=root, env={**ENV, 'ACCELERATE_USE_CPU': 'true', 'PYTHONPATH': str(root)}, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-3000:]
    one,a,b = (torch.load(tmp_path/f'{k}.pt', weights_only=True) for k in ('1-0','2-0','2-1'))
    assert (one['world'], a['world']) == (1, 2) and one['moved'] > 1e-3                  # there is something to compare
    assert all(torch.equal(p, q) for p,q in zip(a['state'].values(), b['state'].values())) # ranks stay the same to the last bit
    assert max(abs(p-q) for p,q in zip(one['losses'], a['losses'])) < 1e-4
    assert max((p.double()-q.double()).abs().max().item() for p,q in zip(one["state"].values(), a["state"].values())) < 2e-6

# A training that is forked from a process in which torch is loaded, killed, and started again until it is through
KILLS = '''
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from lipsync_nb.data.loaders import ClipStore
from lipsync_nb.train.checkpoint import load_model, model_info
from lipsync_nb.train.log import read_log
from lipsync_nb.train.syncnet import EXPERTS, fit_expert
torch.set_num_threads(1)                     # no pool of threads, so that forks are safe
data,out,kills = sys.argv[1],Path(sys.argv[2]),int(sys.argv[3])
train,valid = ClipStore(data, 'train'),ClipStore(data, 'valid')
cfg = replace(EXPERTS['demo'], steps=24, epoch=3, groups=3, per_clip=4)
def fork(name):
    if not (pid := os.fork()):
        try: fit_expert(train, valid, out/name, cfg, resume=True); os._exit(0)
        finally: os._exit(1)
    return pid

t = time.time(); assert os.waitpid(fork('calm'), 0)[1] == 0; whole = time.time()-t
rng,killed = random.Random(0),0
while killed < kills:
    pid = fork('killed'); time.sleep(rng.uniform(.05, .45)*whole)
    os.kill(pid, signal.SIGKILL); killed += os.waitpid(pid, 0)[1] != 0
    if (out/'killed/expert.safetensors').exists(): break
at_kill = killed
assert os.waitpid(fork('killed'), 0)[1] == 0
key = lambda name: [{k: v for k,v in r.items() if k != 'time'} for r in read_log(out/name)]
assert key('calm') == key('killed') and sum('event' not in r for r in key('calm')) == 8
a,b = (out/k/'expert.safetensors' for k in ('calm','killed'))
assert model_info(a) == model_info(b)
assert all(map(torch.equal, load_model(a).state_dict().values(), load_model(b).state_dict().values()))
print('kills survived', at_kill)
'''

def test_kill_at_any_moment(root, data, tmp_path):
    r = subprocess.run([sys.executable, '-c', KILLS, str(data), str(tmp_path), '6'], cwd=root, env=ENV, capture_output=True, text=True, timeout=400)
    assert r.returncode == 0, r.stderr[-3000:]
    assert int(r.stdout.split()[-1]) >= 3, r.stdout

def test_command(root, data, tmp_path):
    "From the folder to an expert, with workers, on two ranks; refused below its gate, and resumed"
    args = ['-m', 'lipsync_nb.train.syncnet', '--data_dir', str(data), '--checkpoint_dir', str(tmp_path), '--preset', 'demo', '--steps', '4', '--batch_size', '8', '--set', 'gate=0,gate_bce=9,per_clip=4', '--workers', '1', '--split_seed', '3']
    env = {**ENV, 'ACCELERATE_USE_CPU': 'true'}
    how = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    r = subprocess.run(how+args, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    assert 'on each of 2 ranks' in r.stdout and r.stdout.count('told from shifted sound') == 1
    from lipsync_nb.train.checkpoint import model_info
    meta = model_info(tmp_path/'expert.safetensors')['meta']
    assert (meta['steps'], meta['split_seed'], meta['seed']) == (4, 3, 0)
