"Known truth: real clips that no expert here has learnt from, their sound moved by -5 to +5 frames; the metrics of sync must say by how much"
import os

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lipsync_nb.core import FPS, SR
from lipsync_nb.data.audio import mel_spectrogram
from lipsync_nb.data.index import load_index
from lipsync_nb.data.loaders import ClipStore
from lipsync_nb.eval.features import load_scorer
from lipsync_nb.media import read_audio
from lipsync_nb.metrics import lse
from lipsync_nb.sample import sample_corpus, sample_data, sample_expert

SHIFTS = range(-5, 6)

def late(wav, k):
    "The sound of a film in which it comes `k` frames later"
    n = abs(k)*SR//FPS
    return np.r_[np.zeros(n, np.float32), wav] if k >= 0 else wav[n:]

@pytest.fixture(scope='module', params=['scorer', 'teacher'])
def scores(request):
    "By shift: the scores of all held-out clips"
    os.environ['LIPSYNC_QUIET'] = '1'
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    scorer,out = load_scorer(sample_expert(request.param), device='cpu'),{k: [] for k in SHIFTS}
    for c in ClipStore(sample_data(), 'test'):
        crops,wav = c.crops[:],read_audio(sample_corpus()/c.person/f'{c.name}.mp4')
        lips = scorer.embed(crops, mel_spectrogram(wav, len(crops)))[0]
        for k in SHIFTS:                                             # the lips stay, so that one look at them is enough
            mel = torch.from_numpy(mel_spectrogram(late(wav, k), len(crops)))
            with torch.inference_mode(): out[k].append(lse(lips, scorer.net.embed_audio(mel.unfold(0, 4*scorer.t, 4).transpose(1, 2))))
    torch.set_num_threads(threads)
    return out

def test_the_clips_are_held_out():
    df = load_index(sample_data()); test = df.split == 'test'
    held,learnt = ({*zip(df[o]['person'], df[o]['clip'])} for o in (test, ~test))
    assert len(held) == test.sum() >= 8 and not held & learnt

def test_the_offset_is_recovered(scores):
    right = [s.offset == -k for k in SHIFTS for s in scores[k]]      # late sound has a negative offset
    assert len(right) >= 8*len(SHIFTS) and np.mean(right) >= .95, f'{np.mean(right):.1%} of {len(right)} offsets'

def test_lse_c_falls_with_the_shift(scores):
    c = [np.mean([s.c for k in {n,-n} for s in scores[k]]) for n in range(6)]
    # it looks for the best shift before it is read, so a frame costs it a third of a percent: two neighbours may tie on eight clips
    assert spearmanr(range(6), c)[0] <= -.9 and c[0] == max(c), np.round(c, 4)
