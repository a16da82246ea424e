"Two ranks of critic steps equal one rank with both halves of the batch, penalty and λ included"
import os, subprocess, sys

# A few critic steps on fixed data; rank r of n takes its share of each batch
STEPS = '''
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from lipsync_nb.gan import GanLoss
from lipsync_nb.models.critic import Critic
rank,n,meet,out = int(sys.argv[1]),int(sys.argv[2]),sys.argv[3],sys.argv[4]
torch.set_num_threads(1); torch.manual_seed(0)
critic = Critic.from_preset('demo'); net = critic
start = [p.detach().clone() for p in critic.parameters()]
if n > 1:
    dist.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=n)
    net = DDP(critic)
opt,gan,data = torch.optim.SGD(critic.parameters(), .01),GanLoss(every=2, tol=.001),torch.Generator().manual_seed(1)
gan.λ.started = True                                     # let λ move from the first step
for step in range(5):
    real,fake,eps = (torch.rand(s, generator=data)[rank::n] for s in ((4,3,3,96,96), (4,3,3,96,96), (4,)))
    o = gan.critic_terms(net, real, fake, step=step, eps=eps)
    opt.zero_grad(); o['loss'].backward(); opt.step()
    if 'norm' in o:
        norm = o['norm'].clone()
        if n > 1: dist.all_reduce(norm); norm /= n
        gan.update(norm)
moved = max((p-q).abs().max().item() for p,q in zip(critic.parameters(), start))
torch.save(dict(params=[p.detach() for p in critic.parameters()], lam=gan.lam, moved=moved), out)
'''

def run(root, tmp_path, n):
    "What each of `n` ranks ends with"
    import torch
    outs = [tmp_path/f'{n}-{r}.pt' for r in range(n)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    ps = [subprocess.Popen([sys.executable, '-c', STEPS, str(r), str(n), str(tmp_path/f'meet{n}'), str(o)], cwd=root, env=env, stderr=subprocess.PIPE, text=True) for r,o in enumerate(outs)]
    for p in ps:
        _,err = p.communicate(timeout=240)
        assert p.returncode == 0, err
    return [torch.load(o, weights_only=True) for o in outs]

def test_two_ranks_equal_one(root, tmp_path):
    import torch
    one, = run(root, tmp_path, 1)
    a,b = run(root, tmp_path, 2)
    assert all(torch.equal(p, q) for p,q in zip(a['params'], b['params'])) and a['lam'] == b['lam'] # ranks stay the same to the last bit
    assert one['moved'] > 1e-3                                                                       # there is something to compare
    assert max((p-q).abs().max().item() for p,q in zip(one['params'], a['params'])) < 1e-6
    assert abs(one['lam']-a['lam']) < 1e-4 and one['lam'] != 10                                      # λ moved, and alike
