"Models where they meet the rest: a critic that listens in the whole game, folded generators in files and in dubbing, checkpoints of before"
import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lipsync_nb.core import LipSyncError
from lipsync_nb.gan import GanLoss, gradient_penalty
from lipsync_nb.losses import feature_matching
from lipsync_nb.models.critic import Critic
from lipsync_nb.models.generator import Generator
from lipsync_nb.train.checkpoint import load_model, save_model

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.manual_seed(0); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.mark.parametrize('kind,norm', [('wgan-gp','layer'), ('wgan-gp',None), ('hinge','spectral')])
def test_a_critic_that_listens_plays_the_whole_game(kind, norm):
    critic,gan = Critic.from_preset('demo', audio=16, norm=norm),GanLoss(kind)
    real,fake,mel = torch.rand(2,5,3,96,96),torch.rand(2,5,3,96,96),torch.randn(2,20,80)
    told = partial(critic, mel=mel)
    terms = gan.critic_terms(told, real, fake)                           # real and painted in one batch, points between in another
    terms['loss'].backward()
    assert not [n for n,p in critic.named_parameters() if p.ndim > 1 and not p.grad.abs().sum() > 0]
    assert ('penalty' in terms) == (kind == 'wgan-gp')
    painted = fake.clone().requires_grad_()
    (gan.gen_loss(told(painted)) + feature_matching(critic.features(painted), critic.features(real))).backward()
    assert painted.grad.abs().sum() > 0

def test_the_penalty_depends_on_what_is_heard():
    critic = Critic.from_preset('demo', audio=16)
    real,fake,mel,ε = torch.rand(2,5,3,96,96),torch.rand(2,5,3,96,96),torch.randn(2,20,80),torch.tensor([.3,.6])
    a,b = (gradient_penalty(partial(critic, mel=m), real, fake, ε)[1] for m in (mel, 3*mel))
    assert (a-b).abs().min() > 1e-6

def test_a_checkpoint_from_before_critics_could_listen(tmp_path):
    critic,clip = Critic.from_preset('demo').eval(),torch.rand(1,5,3,96,96)
    new,old = save_model(critic, tmp_path/'new.safetensors'),tmp_path/'old.safetensors'
    with safe_open(new, 'pt') as f: head = f.metadata()
    cfg = json.loads(head['cfg']); del cfg['audio']
    save_file(load_file(new), old, metadata={**head, 'cfg':json.dumps(cfg)})
    assert torch.equal(load_model(old, Critic).score(clip), critic.score(clip))

def test_a_folded_generator_is_not_mistaken_for_one_that_can_learn(tmp_path):
    path = save_model(Generator.from_preset('demo').for_inference(), tmp_path/'folded.safetensors')
    with pytest.raises(LipSyncError, match='does not fit'): load_model(path)

def test_dubbing_with_a_folded_generator():
    from lipsync_nb.infer.core import LipSync
    from lipsync_nb.infer.lips import CTX
    gen = Generator.from_preset('demo').eval()
    for p in gen.parameters(): p.data += .05*torch.randn(p.shape)        # as if trained
    x,refs,mel = torch.rand(1,4,3,96,96),torch.rand(1,1,3,96,96),torch.randn(1,4*(4+2*CTX),80)
    with torch.inference_mode(): a,b = (m(x, refs, mel) for m in (gen, LipSync(gen=gen, device='cpu', batch=16).engine.gen))
    assert (a-b).abs().max() < 1e-4
