"A training leaves its cards: filled from what is known, silent about names, told in one sentence when it fails, and what the author wrote stays"
import os, re, shutil, socket, subprocess, sys
from pathlib import Path
import pytest

EVIL = 'x\n<!-- /filled -->\n<!-- filled: taken --> | ![a](http://b/c.png) `d` <script>' .replace('/', '∕')     # a folder may be called anything that has no slash
FEW = ['--preset', 'demo', '--batch_size', '2', '--steps', '12', '--set', 'valid=1,film=0']
MINE = 'They are one portrait in eight guises. $1 \\1 | <b>'

def command(module, *args, ranks=1):
    "A command, on as many ranks as are wanted; its results, the first rank's first"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'LIPSYNC_QUIET': '1', 'ACCELERATE_USE_CPU': '1'}
    many = lambda r: dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) if ranks > 1 else {}
    ps = [subprocess.Popen([sys.executable, '-m', f'lipsync_nb.{module}', *map(str, args)], env=env | many(r), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(ranks)]
    outs = [p.communicate(timeout=400) for p in ps]
    return [subprocess.CompletedProcess(p.args, p.returncode, *o) for p,o in zip(ps, outs)]

def yaml_of(path):
    yaml = pytest.importorskip('yaml')
    text = path.read_text(); assert text.startswith('---\n')
    return yaml.safe_load(text.split('---\n')[1])

def said(path, block): return re.search(rf'^<!-- filled: {block} [0-9a-f]{{8}} -->\n(.*?)\n<!-- /filled -->$', path.read_text(), re.M|re.S)[1]

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A run on two ranks, in a folder and on a collection with hostile names; where a card should be, there is something else at first"
    from lipsync_nb.sample import sample_data, sample_expert
    d = tmp_path_factory.mktemp('card'); run,data = d/EVIL/'run',d/f'data {EVIL}'
    shutil.copytree(sample_data(), data); run.mkdir(parents=True); (run/'MODEL_CARD.md').write_text('# My own page\n')
    args = ['--data_dir', data, '--checkpoint_dir', run, '--expert', sample_expert(), *FEW]
    return run, data, args, command('train.launch', *args, ranks=2)

@pytest.fixture
def run(made, tmp_path): return shutil.copytree(made[0], tmp_path/EVIL, ignore=shutil.ignore_patterns('checkpoints', 'MODEL_CARD.md'))

def test_a_card_that_cannot_be_written_does_not_lose_the_run(made):
    run,_,_,(first,second) = made
    assert (first.returncode, second.returncode, (run/'final.safetensors').exists()) == (0, 0, True), first.stderr + second.stderr
    told = [l for l in first.stderr.splitlines() if 'cards' in l]
    assert len(told) == 1 and told[0].endswith('the run itself is not touched by that') and 'Traceback' not in first.stderr, first.stderr
    assert (run/'MODEL_CARD.md').read_text() == '# My own page\n' and 'card' not in second.stderr.lower()      # nothing was overwritten, and one rank speaks

def test_the_same_command_fills_them_once_there_is_room(made):
    run,_,args,_ = made; (run/'MODEL_CARD.md').unlink(missing_ok=True)
    r = command('train.launch', *args, ranks=2)[0]
    assert r.returncode == 0 and len(re.findall(r'CARD\.md: \d questions left to the author', r.stdout)) == 2, r.stderr
    from lipsync_nb.core import load_json
    from lipsync_nb.train.card import read_run
    assert len(load_json(run/'run.json')['sessions']) == 2 and len(read_run(run).sessions) == 1              # the second start had nothing to train
    assert '- ranks: 2' in said(run/'MODEL_CARD.md', 'machine')
    assert not [p for p in run.iterdir() if p.name.startswith('.')]

def test_what_is_known_is_there_and_nobody_is_named(run, made):
    from lipsync_nb.core import hash_file
    from lipsync_nb.train.card import make_cards
    make_cards(run); model,data = run/'MODEL_CARD.md',run/'DATA_CARD.md'
    assert yaml_of(model) == dict(library_name='lipsync_nb', pipeline_tag='video-to-video', tags=['lip-sync', 'talking-face', 'dubbing'])  # a licence is the author's to name
    assert 'license' not in yaml_of(data)
    assert hash_file(run/'final.safetensors') in said(model, 'model') and hash_file(made[1]/'index.parquet') in said(data, 'collection')
    assert 'energy: not measured' in said(model, 'machine') and 'languages: not recorded' in said(data, 'collection') and said(model, 'evaluation').startswith('Not evaluated')
    assert '| test | 4 | 4 | 8 | 8 |' in said(data, 'splits') and '20 clips of 4 persons' in said(model, 'taken')
    text = model.read_text() + data.read_text()
    assert not re.search(r'\bp[0-3]\b|\bc0\d\b', text) and str(made[1].parent) not in text                    # persons, clips, paths of this machine
    assert not re.search(r'\bFID\b', text.replace('not FID', ''))

def test_hostile_names_are_only_text(run):
    from lipsync_nb.train.card import make_cards
    for _ in range(2): assert make_cards(run) == []
    for f,blocks in (('MODEL_CARD.md', 7), ('DATA_CARD.md', 4)):
        text = (run/f).read_text()
        assert len(re.findall('^<!-- filled: ', text, re.M)) == len(re.findall('^<!-- /filled -->$', text, re.M)) == blocks
        assert '<script>' not in text and '![a]' not in text and len(re.findall('^# ', text.split('---\n')[2], re.M)) == 1

def test_what_the_author_wrote_is_kept(run):
    from lipsync_nb.train.card import ASK, CONSENT, make_cards
    make_cards(run); model,data = run/'MODEL_CARD.md',run/'DATA_CARD.md'
    first = model.read_text()
    mine = first.replace(f'> {ASK} {CONSENT}', MINE).replace('# license: to be written by the author', 'license: cc-by-nc-4.0').replace('## Known failures', '## Wo es nicht geht – schön wär’s') + '\n## Thanks\n\nTo all.\n'
    model.write_text(mine); assert make_cards(run) == [] and model.read_text() == mine                          # nothing new: not a byte is another
    model.write_bytes(mine.replace('\n', '\r\n').encode()); assert make_cards(run) == [] and model.read_text() == mine # an editor that ends lines otherwise
    (run/'log.jsonl').unlink(); make_cards(run)
    assert 'how the training went is not recorded' in said(model, 'training') and yaml_of(model)['license'] == 'cc-by-nc-4.0'
    outside = lambda t: re.sub(r'^<!-- filled: .*?^<!-- /filled -->$', '', t, flags=re.M|re.S)
    assert outside(model.read_text()) == outside(mine)
    by_hand = model.read_text().replace('- class: Generator', '- class: Generator, and a good one'); model.write_text(by_hand)
    assert make_cards(run) == ['block model of MODEL_CARD.md was changed by hand and is kept; empty it to have it filled anew'] and model.read_text() == by_hand

def test_nothing_is_made_up_where_little_is_left(run):
    "Only the weights are there"
    from lipsync_nb.train.card import make_cards
    for p in run.iterdir():
        if p.name != 'final.safetensors': shutil.rmtree(p) if p.is_dir() else p.unlink()
    make_cards(run); model,data = run/'MODEL_CARD.md',run/'DATA_CARD.md'
    assert said(model, 'machine').count('not recorded') == 7 and said(model, 'expert').endswith('Its accuracy is not recorded.')
    assert said(model, 'validation') == 'The log holds no figures of validation.'
    assert all(said(data, b).startswith('Not recorded') for b in ('collection', 'splits', 'films', 'taken'))

def test_a_run_that_is_not_complete_says_so(run):
    from lipsync_nb.train.card import make_cards
    (run/'final.safetensors').unlink(); assert make_cards(run) == []
    assert 'not complete' in said(run/'MODEL_CARD.md', 'model') and '20 clips of 4 persons' in said(run/'MODEL_CARD.md', 'taken')

def test_a_failed_write_leaves_the_card_as_it_was(run, monkeypatch):
    from lipsync_nb.core import LipSyncError
    from lipsync_nb.train.card import make_cards
    make_cards(run); before = (run/'MODEL_CARD.md').read_bytes(); (run/'log.jsonl').unlink()
    def full(*_, **__): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_text', full)
        with pytest.raises(LipSyncError, match=r'No space left on device; make room'): make_cards(run)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): make_cards(run)
    assert (run/'MODEL_CARD.md').read_bytes() == before and not [p for p in run.iterdir() if p.name.startswith('.')]

@pytest.mark.parametrize('spoil,why', [(lambda r: (r/'log.jsonl').write_text('{"step": \n{}\n'), 'is not an entry of a log'), (lambda r: (r/'run.json').write_text('[]'), 'is damaged'),
    (lambda r: (r/'MODEL_CARD.md').write_bytes(b'\xff\xfe\x00'), 'cannot read'), (lambda r: (r/'MODEL_CARD.md').write_text('<!-- filled: model -->\n'), 'without its other half'),
    (lambda r: (r/'final.safetensors').write_bytes(b'no'), 'is not a safetensors file')])
def test_bad_input_is_one_sentence(run, spoil, why):
    from lipsync_nb.core import LipSyncError
    from lipsync_nb.train.card import lipsync_card
    lipsync_card(run); spoil(run); before = (run/'DATA_CARD.md').read_bytes()
    with pytest.raises(LipSyncError, match=why): lipsync_card(run)
    assert (run/'DATA_CARD.md').read_bytes() == before

def test_as_a_command(tmp_path):
    r, = command('train.card', tmp_path)
    assert (r.returncode, len(r.stderr.splitlines())) == (2, 1) and 'is no folder of a run' in r.stderr and r.stderr.startswith('lipsync_card: '), r.stderr

def test_a_report_of_this_model_is_taken_over_and_no_other(run, tmp_path):
    from lipsync_nb.core import LipSyncError, hash_file, load_json, save_json
    from lipsync_nb.eval.core import evaluate_checkpoint
    from lipsync_nb.sample import sample_data, sample_expert
    from lipsync_nb.train.card import make_cards
    facts = evaluate_checkpoint(run/'final.safetensors', sample_data(), tmp_path/'judged', scorer=sample_expert('scorer'), teacher=sample_expert(), limit=1, workers=0)
    assert make_cards(run, report=tmp_path/'judged'/'metrics.json') == []
    shutil.rmtree(tmp_path/'judged'); assert make_cards(run) == []                                              # it lies in the run's folder now
    text = said(run/'MODEL_CARD.md', 'evaluation')
    assert all(f'| {r} ' in text.splitlines()[2] for r in ('real', 'generated', 'static')) and 'Of 1 clips of the test split' in text
    assert f'{facts["rows"]["generated"]["mouth_psnr"]["value"]:.3g}' in text and not re.search(r'\bFID\b', text)
    save_json(load_json(run/'eval-test.json') | dict(settings=facts['settings'] | dict(checkpoint='final.safetensors 123456')), tmp_path/'other.json')
    with pytest.raises(LipSyncError, match='judges another checkpoint'): make_cards(run, report=tmp_path/'other.json')
    (run/'eval').mkdir(); shutil.copy(tmp_path/'other.json', run/'eval'/'metrics.json')
    assert [s.startswith('left out: ') for s in make_cards(run)] == [True] and said(run/'MODEL_CARD.md', 'evaluation') == text

def test_an_expert_has_cards_too(tmp_path):
    "Also one that has not passed its gate: the card says so"
    from lipsync_nb.sample import sample_data
    r, = command('train.syncnet', '--data_dir', sample_data(), '--checkpoint_dir', tmp_path/'e', '--preset', 'demo', '--steps', '2', '--split_seed', '3', '--set', 'judged=4')
    assert r.returncode == 2 and 'to teach' in r.stderr, r.stderr                                               # too few steps to teach
    model = tmp_path/'e'/'MODEL_CARD.md'
    assert 'syncnet' in yaml_of(model)['tags'] and 'pipeline_tag' not in yaml_of(model)
    assert 'gate of its preset: not passed' in said(model, 'expert') and 'anew, with seed 3' in said(model, 'expert') and 'drawn anew' in said(model, 'taken')
    assert 'contrastive loss' in said(model, 'validation') and 'Evaluation' not in model.read_text()
