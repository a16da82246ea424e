"A training leaves films of what it paints: in its folder, in its page and at W&B; they change nothing about the run, and W&B never holds it up"
import json, time
from dataclasses import replace
import pytest, torch

@pytest.fixture(scope='module')
def train():
    "Train a listen and a coarse stage, a few steps each"
    from lipsync_nb.data.loaders import ClipStore
    from lipsync_nb.sample import sample_data
    from lipsync_nb.train.config import RUNS
    from lipsync_nb.train.learner import Run
    torch.set_num_threads(1); data = [ClipStore(sample_data(), s) for s in ('train','valid')]
    def fit(out, film=50, **kw):
        stages = tuple(replace(s, steps=4, bs=2) for s in RUNS['demo'].stages[:2])
        run = Run(*data, out, replace(RUNS['demo'], stages=stages, epoch=2, valid=1, film=film), **kw); run.fit()
        return run
    return fit

@pytest.fixture
def offline(tmp_path, monkeypatch):
    for k,v in dict(WANDB_MODE='offline', WANDB_CACHE_DIR='cache', WANDB_DATA_DIR='data', WANDB_CONFIG_DIR='config').items(): monkeypatch.setenv(k, v if k == 'WANDB_MODE' else str(tmp_path/v))

def history(folder):
    "What an offline run has in store for W&B, once its process has written the last of it"
    from wandb.proto import wandb_internal_pb2 as pb
    from wandb.sdk.internal.datastore import DataStore
    def scan():
        store = DataStore(); store.open_for_scan(str(next(folder.glob('wandb/offline-run-*/*.wandb'))))
        while data := store.scan_data(): yield pb.Record.FromString(data)
    for _ in range(300):
        rs = list(scan())
        if any(r.WhichOneof('record_type') == 'exit' for r in rs): break
        time.sleep(.2)
    return [{i.key or '.'.join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in rs if r.WhichOneof('record_type') == 'history']

def test_films_lie_in_the_folder_the_page_and_at_wandb(train, offline, tmp_path):
    from lipsync_nb.media import probe
    from lipsync_nb.train.report import run_report
    out = tmp_path/'run'; train(out, use_wandb=True)
    films = sorted(p.name for p in (out/'samples').glob('*.mp4'))
    assert films == ['step-00000006.mp4', 'step-00000008.mp4']                         # after each validation of the stage that paints
    i = probe(out/'samples'/films[0]); assert (i.n_frames, i.fps, i.has_audio) == (50, 25., True)
    assert run_report(out).read_text().count('<video') == 2
    sent = [h for h in history(out) if 'clip._type' in h]
    assert [h['step'] for h in sent] == [6, 8] and all(h['clip._type'] == 'video-file' and 'real, painted' in h['clip.caption'] for h in sent)
    kept = [next(out.glob(f'wandb/offline-run-*/files/{h["clip.path"]}')) for h in sent]
    assert [p.read_bytes() for p in kept] == [(out/'samples'/f).read_bytes() for f in films]

def test_films_change_nothing_and_can_be_left_out(train, tmp_path):
    a,b = train(tmp_path/'a'),train(tmp_path/'b', film=0)
    assert list((tmp_path/'a'/'samples').glob('*.mp4')) and not list((tmp_path/'b'/'samples').glob('*.mp4'))
    assert all(torch.equal(p, q) for p,q in zip(a.gen.parameters(), b.gen.parameters()))

def test_a_wandb_that_refuses_films_does_not_hold_up_the_run(train, offline, tmp_path, monkeypatch, capsys):
    import wandb
    def refuse(*_, **__): raise ValueError('no videos today')
    monkeypatch.setattr(wandb, 'Video', refuse)
    run = train(tmp_path/'run', use_wandb=True)
    assert (run.out/'final.safetensors').exists() and len(list((run.out/'samples').glob('*.mp4'))) == 2
    assert capsys.readouterr().err.count('W&B failed at a sample (ValueError: no videos today); the run goes on without it') == 1
