"`lipsync_eval` as a user runs it: the whole command, what it refuses, the same bytes twice, and nothing half-written"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from lipsync_nb.eval.report import read_clips
from lipsync_nb.eval.rows import ROWS
from lipsync_nb.sample import sample_corpus, sample_data, sample_expert, sample_generator

EVAL = [sys.executable, '-c', 'from lipsync_nb.core import _run; from lipsync_nb.eval.core import lipsync_eval; _run(lipsync_eval)']
ENV = os.environ | dict(LIPSYNC_QUIET='1', OMP_NUM_THREADS='1')
FILES = ['clips.csv','metrics.json','report.html']

def run(*args, **kw): return subprocess.run([*EVAL, *map(str, args)], capture_output=True, text=True, env=ENV, timeout=300, **kw)

@pytest.fixture(scope='module')
def got():
    "What there is to judge, and by whom"
    return dict(checkpoint=sample_generator(), data=sample_data(), scorer=sample_expert('scorer'))

def flags(**kw): return [o for k,v in kw.items() for o in (f'--{k}', v)]

@pytest.fixture(scope='module')
def done(got, tmp_path_factory):
    "Two runs of the same evaluation, with one and with two workers"
    d = tmp_path_factory.mktemp('eval')
    return [(d/f'out{w}', run(*flags(**got, out=d/f'out{w}', limit=1, workers=w))) for w in (0, 2)]

def test_whole_command(done):
    out,r = done[0]
    assert r.returncode == 0, r.stderr
    assert sorted(p.name for p in out.iterdir()) == FILES
    facts = json.loads((out/'metrics.json').read_text())
    assert (facts['schema'], facts['kind'], len(facts['account']), facts['failed']) == (1, 'checkpoint', 1, [])
    assert set(facts['rows']) == set(ROWS)-{'silent'} == {c['row'] for c in read_clips(out)}
    g,still = facts['rows']['generated'],facts['rows']['static']
    assert g['mouth_corr']['value'] > still['mouth_corr']['value'] and g['sync_acc']['value'] > still['sync_acc']['value']
    assert facts['audit']['max_gradient'] == facts['audit']['max_change'] == 0
    for s in ('generated', 'mouth_corr', 'open '): assert s in r.stdout

def test_page_stands_alone(done):
    page = (done[0][0]/'report.html').read_text()
    for s in ('<script', 'http:', 'https:', 'href=', str(Path.home()), str(done[0][0].parent)): assert s not in page.replace('http://www.w3.org', '')
    for s in ('In short', 'Where in time it fails', 'What was not measured', '<video'): assert s in page

def test_same_bytes(done):
    for name in FILES[:2]: assert (done[0][0]/name).read_bytes() == (done[1][0]/name).read_bytes()

def test_compare(done, tmp_path):
    r = run('--compare', done[0][0], '--against', done[1][0])
    assert r.returncode == 0 and 'no difference can be told' in r.stdout

@pytest.fixture
def bad(tmp_path, got):
    "Things that are not what they should be"
    (tmp_path/'file').write_text('x'); (tmp_path/'junk.safetensors').write_bytes(b'junk'*50)
    (tmp_path/'pairs.csv').write_text('real,fake\na,b\n'); (tmp_path/'gone.csv').write_text('real,made\na.mp4,b.mp4\n')
    return got | dict(d=tmp_path, corpus=sample_corpus())

@pytest.mark.parametrize('args,says', [
    ('', 'say what to judge'),
    ('--checkpoint {checkpoint} --pairs {d}/pairs.csv', 'say what to judge'),
    ('--checkpoint {checkpoint} --data {data}', 'no --out given'),
    ('--checkpoint {checkpoint} --out {d}/o', 'no --data given'),
    ('--checkpoint {d}/none.safetensors --data {data} --out {d}/o', 'there is no checkpoint'),
    ('--checkpoint {d}/junk.safetensors --data {data} --out {d}/o', 'not a safetensors file'),
    ('--checkpoint {scorer} --data {data} --out {d}/o', 'give the checkpoint of a Generator'),
    ('--checkpoint {checkpoint} --data {corpus} --out {d}/o', 'has no index'),
    ('--checkpoint {checkpoint} --data {data} --split exam --out {d}/o', 'no clip in its exam split'),
    ('--checkpoint {checkpoint} --data {data} --out {d}/file', 'is a file; name a folder'),
    ('--checkpoint {checkpoint} --data {data} --out {d}/o --scorer {d}/none', 'there is no file'),
    ('--checkpoint {checkpoint} --data {data} --out {d}/o --scorer {checkpoint}', 'SyncNet'),
    ('--pairs {d}/pairs.csv --out {d}/o', 'has no column called made'),
    ('--pairs {d}/gone.csv --out {d}/o', 'does not exist'),
    ('--pairs {d}/none.csv --out {d}/o', 'cannot read'),
    ('--compare {d}', '--against'),
    ('--compare {d} --against {d}', 'no folder of an evaluation')])
def test_refused(bad, args, says, capsys, monkeypatch):
    "One sentence, exit code 2, and nothing written"
    from lipsync_nb.core import _run
    from lipsync_nb.eval.core import lipsync_eval
    monkeypatch.setattr(sys, 'argv', ['lipsync_eval', *args.format(**bad).split()])
    with pytest.raises(SystemExit) as e: _run(lipsync_eval)
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count('\n') == 1
    assert not (bad['d']/'o').exists()

def test_killed(got, tmp_path):
    "Killed in the middle, an evaluation leaves what was there before and nothing else"
    out = tmp_path/'out'; out.mkdir()
    for name in FILES: (out/name).write_text('before')
    p = subprocess.Popen([*EVAL, *map(str, flags(**got, out=out, workers=0))], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(6); assert p.poll() is None, 'it ended before it was killed'
    p.send_signal(signal.SIGKILL); p.wait()
    assert sorted(o.name for o in out.iterdir()) == FILES and {(out/name).read_text() for name in FILES} == {'before'}
