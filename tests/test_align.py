"Phones of prepared clips: the demo's TextGrids give its truth, pocketsphinx comes close, a killed run loses nothing, and real lips are shut where they should be"
import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from lipsync_nb.core import load_json
from lipsync_nb.data.align import add_phones
from lipsync_nb.data.folder import file_entry, list_metas, load_meta, load_track
from lipsync_nb.data.phones import fit_phones, load_phones
from lipsync_nb.data.preprocess import is_done, preprocess
from lipsync_nb.data.structure import check_struct, find_clips
from lipsync_nb.mouth import bilabial_ratio

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).parents[2]/'shared/data/real')

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "Two persons of the demo with two clips each, and their prepared folders"
    for o in ('espeakng_loader', 'skimage', 'praatio', 'mediapipe'): pytest.importorskip(o)
    from lipsync_nb.demo import make_corpus
    d = tmp_path_factory.mktemp('corpus')
    make_corpus(d/'raw', n_persons=2, n_clips=2)
    assert preprocess(d/'raw', d/'out')['accepted'] == 4
    return d

def copy(corpus, to):
    "A corpus of one's own"
    shutil.copytree(corpus, to, dirs_exist_ok=True)
    return to/'raw',to/'out'

def truth(raw, folder):
    from lipsync_nb.demo import load_truth
    m = load_meta(folder)
    return fit_phones(load_truth(raw/m['source']['path'])['phones'], m['n_frames'])

def whole(out):
    "Every folder has the files that its `meta.json` names, and no other"
    for f,m in list_metas(out):
        assert {p.name: file_entry(p) for p in f.iterdir() if p.name != 'meta.json'} == m['files'], f
        if 'phones.json' in m['files']: assert m['phones']['n'] == len(load_phones(f)['phones'])

def phones(out): return {f.relative_to(out).as_posix(): load_phones(f) for f,_ in list_metas(out)}

QUIET = {**os.environ, 'LIPSYNC_QUIET': '1', 'OMP_NUM_THREADS': '1'}

def align(*args): return [sys.executable, '-m', 'lipsync_nb.data.align', *map(str, args)]

def run(*args, **env): return subprocess.run(align(*args), capture_output=True, text=True, env={**QUIET, **env})

def test_textgrids_and_transcripts_are_no_clips(corpus):
    assert len(find_clips(corpus/'raw')) == 4 and check_struct(corpus/'raw')['problems'] == {}
    assert len(list((corpus/'raw').glob('*/*.TextGrid'))) == len(list((corpus/'raw').glob('*/*.txt'))) == 4

def test_textgrids_give_the_truth(corpus, tmp_path):
    raw,out = copy(corpus, tmp_path)
    s = add_phones(raw, out, 'textgrid')
    assert (s['added'], s['failed']) == (4, 0)
    for f,_ in list_metas(out): assert load_phones(f) == dict(by='textgrid', phones=truth(raw, f))
    whole(out)
    for c in find_clips(raw): assert is_done(c, out)                     # nothing for preprocessing to do again
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    assert add_phones(raw, out, 'textgrid')['skipped'] == 4
    assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} == before

def test_changed_and_missing(corpus, tmp_path):
    raw,out = copy(corpus, tmp_path)
    add_phones(raw, out, 'textgrid'); old = phones(out)
    (raw/'p0/c00.TextGrid').unlink(); shutil.copy(raw/'p1/c00.TextGrid', raw/'p0/c01.TextGrid')
    r = run(raw, out, '--json', tmp_path/'s.json')
    assert r.returncode == 1 and 'there is no TextGrid for p0/c00.mp4' in r.stdout and not r.stderr
    s = load_json(tmp_path/'s.json')
    assert (s['skipped'], s['added'], s['reasons']) == (2, 1, {'no TextGrid': 1})
    new = phones(out)
    assert new['p0/c00'] == old['p0/c00'] and new['p0/c01']['phones'][:9] == old['p1/c00']['phones'][:9]
    whole(out)

def test_pocketsphinx_comes_close_and_survives_a_kill(corpus, tmp_path):
    pytest.importorskip('pocketsphinx')
    (raw,out),(_,calm) = copy(corpus, tmp_path/'a'),copy(corpus, tmp_path/'b')
    p = subprocess.Popen(align(raw, out, '--how', 'pocketsphinx', '--workers', 2), stdout=subprocess.DEVNULL, env=QUIET); end = time.monotonic()+120
    while not list(out.glob('*/[!.]*/phones.json')) and time.monotonic() < end and p.poll() is None: time.sleep(.002)
    p.send_signal(signal.SIGKILL); p.wait()
    whole(out)
    assert 0 < sum(o is not None for o in phones(out).values())
    preprocess(raw, out)                                                 # should a folder have been caught without its clip
    r = run(raw, out, '--how', 'pocketsphinx')
    assert r.returncode == 0, r.stderr
    assert add_phones(raw, calm, 'pocketsphinx', workers=0)['failed'] == 0
    assert phones(out) == phones(calm)
    whole(out)
    for f,_ in list_metas(out):
        found,true = [[o for o in ph if o[2] in ('p','b','m')] for ph in (load_phones(f)['phones'], truth(raw, f))]
        assert [o[2] for o in found] == [o[2] for o in true]
        assert not true or np.median([abs(a[0]-b[0]) for a,b in zip(found, true)]) < .04

def test_bad_use(corpus, tmp_path):
    for args,says in (((corpus/'raw', tmp_path/'none'), 'give one that lipsync_preprocess made'), ((tmp_path/'none', corpus/'out'), 'give the collection'),
                      ((corpus/'raw', corpus/'out', '--how', 'ear'), 'phones come by textgrid, mfa, pocketsphinx, not by ear'),
                      ((corpus/'raw', corpus/'out', '--how', 'mfa'), 'conda install -c conda-forge montreal-forced-aligner')):
        r = run(*args, PATH=str(tmp_path))
        assert r.returncode == 2 and says in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr

# The file names of the GRID corpus spell what is said
GRID = [dict(b='bin', l='lay', p='place', s='set'), dict(b='blue', g='green', r='red', w='white'), dict(a='at', b='by', i='in', w='with'), {},
        dict(zip('z123456789', 'zero one two three four five six seven eight nine'.split())), dict(a='again', n='now', p='please', s='soon')]

def test_real_lips_are_shut(tmp_path):
    "On recordings of people, the mouth is nearly shut on p b m as pocketsphinx finds them, and open two frames earlier or later"
    pytest.importorskip('pocketsphinx')
    clips = [p for p in sorted(REAL.glob('grid_*/*.mp4')) if re.fullmatch('[blps][bgrw][abiw][a-z][z1-9][anps]', p.stem) and set(p.stem) & set('bp')]
    if not clips: pytest.skip('no clips of the GRID corpus: LIPSYNC_REAL_DATA names no folder with grid_…')
    for p in clips[::len(clips)//6][:6]:
        to = tmp_path/'raw'/p.parent.name/p.name; to.parent.mkdir(parents=True, exist_ok=True); to.symlink_to(p.resolve())
        to.with_suffix('.txt').write_text(' '.join(words.get(c, c) for words,c in zip(GRID, p.stem)))
    preprocess(tmp_path/'raw', tmp_path/'out')
    s = add_phones(tmp_path/'raw', tmp_path/'out', 'pocketsphinx')
    assert s['added'] >= 5, s['failures']
    def ratio(frames): return np.nanmean([bilabial_ratio(load_track(f)['shape'][:,0], [[a+frames/25, b+frames/25, n] for a,b,n in load_phones(f)['phones']])
                                          for f,m in list_metas(tmp_path/'out') if 'phones' in m])
    now = ratio(0)
    assert now < .3 and now < ratio(-2)/2 and now < ratio(2)/2, (ratio(-2), now, ratio(2))
