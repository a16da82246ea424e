"A batch of films: killed at any moment it resumes, and ends in the films that an undisturbed run makes; one failure costs nothing else"
import hashlib, json, os, random, re, shutil, signal, subprocess, sys, time
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.transform import resize

from lipsync_nb.core import SR, LipSyncError, load_json
from lipsync_nb.infer.core import LipSync
from lipsync_nb.infer.manifest import ManifestError, read_jobs
from lipsync_nb.infer.production import plan, run_batch
from lipsync_nb.media import read_frames, write_audio, write_video
from lipsync_nb.models.generator import Generator
from lipsync_nb.train.checkpoint import save_model

linux = pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc and sends POSIX signals')
FILMS = {'-a':40, 'b é 顔':60, 'c':50, 'd':30}                           # name → frames; awkward names on purpose

def portrait(): return (resize(astronaut()[:320,64:384], (192,192), anti_aliasing=True)*255).astype(np.uint8)
def sway(n): im = portrait(); return (np.roll(im, (round(2*np.sin(i/5)), round(2*np.cos(i/7))), (0,1)) for i in range(n))
def hum(seconds): t = np.arange(round(seconds*SR))/SR; return (.2*np.sin(440*np.pi*t)*np.sin(4*np.pi*t).clip(0)).astype(np.float32)

def command(*args, pre=()): return [*pre, sys.executable, '-m', 'lipsync_nb.infer.production', *map(str, args)]
def start(*args, **kw): return subprocess.Popen(command(*args, **kw), env={**os.environ, 'LIPSYNC_QUIET':'1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
def finish(p, code=0, seconds=240):
    out,err = p.communicate(timeout=seconds)
    assert p.returncode == code, out+err
    return out

def wait_for(cond, seconds=120):
    end = time.time()+seconds
    while not (got := cond()):
        assert time.time() < end, 'waited in vain'
        time.sleep(.01)
    return got

def temps(out): return list(out.glob('.*.tmp*.mp4'))
def names(out): return sorted(o.name for o in out.iterdir())
def films(out): return {p.name: [hashlib.sha256(f.tobytes()).hexdigest() for _,f in read_frames(p)] for p in out.glob('*.mp4')}
WANT = sorted(f'{n}.{e}' for n in FILMS for e in ('json','mp4'))

def manifest(store, out, **crf):
    "A list of all films, with the output in `out`"
    p = store/f'{out.parent.name}-{out.name}.csv'
    p.write_text('video,audio,output,crf\n' + ''.join(f'{n}.mp4,{n}.wav,{out}/{n}.mp4,{crf.get(n, "")}\n' for n in FILMS), encoding='utf-8')
    return p

def batch(store, out, *args, **kw): return start(manifest(store, out), '--checkpoint', store/'gen.safetensors', '--workers', 2, '--threads', 1, *args, **kw)

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "Four films and sounds, a generator that has learnt nothing, and what an undisturbed batch makes of them"
    d = tmp_path_factory.mktemp('store'); torch.manual_seed(0)
    for n,k in FILMS.items(): write_video(d/f'{n}.mp4', sway(k)); write_audio(d/f'{n}.wav', hum(k/25))
    write_video(d/'grey.mp4', [np.full((96,96,3), 99, np.uint8)]*5)
    save_model(Generator.from_preset('demo'), d/'gen.safetensors')
    said = finish(batch(d, d/'calm', '--json', d/'calm.summary'))
    s = load_json(d/'calm.summary')
    assert (s['jobs'], s['done'], s['already'], s['failed'], s['left'], s['frames']) == (4, 4, 0, 0, 0, 180) and '4 done' in said
    assert names(d/'calm') == WANT
    return d

@pytest.fixture(scope='module')
def calm(store): return films(store/'calm')

def same(store, out, calm):
    assert names(out) == WANT                                              # no lock, nothing half-written
    assert films(out) == calm
    for n in FILMS: assert load_json(out/f'{n}.json')['frames'] == FILMS[n]

def test_calm(store, calm):
    "The films are there in full, each with a report that says what it was made of; the longest began first"
    assert {k: len(v) for k,v in calm.items()} == {f'{n}.mp4': k for n,k in FILMS.items()}
    bs = {n: load_json(store/f'calm/{n}.json')['batch'] for n in FILMS}
    assert sorted(FILMS, key=lambda n: bs[n]['begin'])[0] in sorted(FILMS, key=FILMS.get)[-2:]   # two workers start at once
    assert len({b['pid'] for b in bs.values()}) == 2 and {b['threads'] for b in bs.values()} == {1}
    assert bs['c']['video']['size'] == (store/'c.mp4').stat().st_size and len(bs['c']['spec']['model']) == 32

@linux
def test_killed_at_any_moment(store, calm, tmp_path):
    "Kill the whole batch at random moments; what is there is whole, and in the end all is as if nothing had happened"
    out,rng = tmp_path/'out',random.Random(os.environ.get('LIPSYNC_SEED', 0))
    for _ in range(int(os.environ.get('LIPSYNC_KILLS', 2))):
        n = len(list(out.glob('[!.]*.json'))); p = batch(store, out)
        wait_for(lambda: p.poll() is not None or temps(out) or len(list(out.glob('[!.]*.json'))) > n)
        time.sleep(rng.uniform(0, .6))
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.communicate()
        for f in out.glob('[!.]*.mp4'): assert films(out)[f.name] == calm[f.name]
        for f in out.glob('[!.]*.json'): assert f.with_suffix('.mp4').exists() and load_json(f)['batch']
    before = {f: f.stat().st_mtime_ns for f in out.glob('[!.]*.mp4') if f.with_suffix('.json').exists()}
    said = finish(batch(store, out))
    assert f'{4-len(before)} done, {len(before)} already done' in said
    assert all(f.stat().st_mtime_ns == t for f,t in before.items())          # what was finished was not made again
    same(store, out, calm)

@linux
def test_killed_workers(store, calm, tmp_path):
    "A worker that is killed costs no film: its film is made again at the end. A film that kills each of its workers is given up; the others are made"
    out = tmp_path/'out'; p = batch(store, out, '--json', tmp_path/'s.json'); killed = dict(c=set(), d=set())
    def kill():
        for t in temps(out):
            name,pid = t.name.lstrip('.')[0],int(re.search(r'\.tmp(\d+)', t.name)[1])
            if pid in killed['c']|killed['d']: continue                     # what it left is still there
            if name == 'c' or name == 'd' and not killed['d']: os.kill(pid, signal.SIGKILL); killed[name].add(pid)
        return p.poll() is not None
    wait_for(kill)
    finish(p, 1)
    assert {k: len(v) for k,v in killed.items()} == dict(c=2, d=1)
    got = {Path(r['output']).stem: (r['status'], r['kind'], r['tries']) for r in load_json(tmp_path/'s.json')['records']}
    assert got == {'-a':('done','',1), 'b é 顔':('done','',1), 'c':('failed','died',2), 'd':('done','',2)}
    assert [n for n in names(out) if n != '.c.parts'] == [n for n in WANT if not n.startswith('c.')]   # what was begun of it may be taken up again
    assert films(out) == {k: v for k,v in calm.items() if k != 'c.mp4'}

@linux
def test_interrupted(store, calm, tmp_path, capsys):
    "Ctrl-C: what is finished is kept, nothing is half-written, and the summary says so; then one option is changed, and one film is made again"
    out = tmp_path/'out'; p = batch(store, out, '--json', tmp_path/'s.json')
    wait_for(lambda: list(out.glob('[!.]*.json')) and temps(out) or p.poll() is not None)
    os.killpg(p.pid, signal.SIGINT)
    said,err = p.communicate(timeout=60)
    err = [o for o in err.splitlines() if not re.match(r'[IW]\d{4} |INFO: |WARNING: All log', o)]
    assert p.returncode == 2 and len(err) == 1 and 'interrupted' in err[0], err
    s = load_json(tmp_path/'s.json'); assert s['left'] and f"{s['left']} left" in said
    assert not [o for o in out.glob('.*') if not o.name.endswith('.parts')] and len(list(out.glob('*.json'))) >= max(s['done'], 1)
    jobs = read_jobs(manifest(store, out, d=30), store/'gen.safetensors'); torch.set_num_threads(1)
    plan(jobs); said = capsys.readouterr().out; assert re.search(r'd\.mp4, 1\.2 s of film', said) and '; about ' in said
    assert {r['status'] for r in run_batch(jobs, workers=0)} == {'done', 'already'}
    got = films(out); assert got.pop('d.mp4') != calm['d.mp4'] and all(got[k] == calm[k] for k in got) and len(got) == 3
    plan(jobs); assert capsys.readouterr().out.startswith('0 of 4 jobs to do')

@linux
def test_two_batches_at_once(store, calm, tmp_path):
    "Two batches over one list share the work: each film is made once"
    out = tmp_path/'out'; ps = [batch(store, out, '--json', tmp_path/f'{i}.json') for i in range(2)]
    for p in ps: finish(p)
    s = [load_json(tmp_path/f'{i}.json') for i in range(2)]
    assert [o['done']+o['already'] for o in s] == [4,4] and sum(o['done'] for o in s) == 4
    same(store, out, calm)

def test_too_slow_and_refused(store, calm, tmp_path):
    "One film takes too long, one has no face, one is fine"
    write_audio(tmp_path/'long.wav', hum(900))
    (tmp_path/'m.jsonl').write_text('\n'.join(json.dumps(o) for o in (dict(video=str(store/'d.mp4'), audio='long.wav', output='long.mp4', follow='audio'),
        dict(video=str(store/'grey.mp4'), audio='long.wav', output='grey.mp4'), dict(video=str(store/'d.mp4'), audio=str(store/'d.wav'), output='notes/d.mp4'))))
    p = start(tmp_path/'m.jsonl', '--checkpoint', store/'gen.safetensors', '--workers', 2, '--threads', 1, '--limit', 30, '--reports', tmp_path/'rep', '--json', tmp_path/'s.json')
    said = finish(p, 1); s = load_json(tmp_path/'s.json')
    assert [(r['status'], r['kind'], r['tries']) for r in s['records']] == [('failed','late',1), ('failed','refused',1), ('done','',1)]
    assert 'took longer than 30 s' in said and 'no face' in said and s['reasons'] == dict(late=1, refused=1)
    assert [n for n in names(tmp_path) if n != '.long.parts'] == ['long.wav', 'm.jsonl', 'notes', 'rep', 's.json'] and films(tmp_path/'notes') == {'d.mp4': calm['d.mp4']}   # the parts that a fast machine has finished by then may be taken up again
    assert names(tmp_path/'rep/notes') == ['d.json']

def test_bad_list(store, tmp_path):
    "All that is wrong is told at once, and nothing is started"
    (tmp_path/'m.csv').write_text(f'video,audio,output,krf\n{store}/c.mp4,none.wav,out/x.mp4,\n{store}/c.mp4,{store}/c.wav,out/../out/X.MP4,\n')
    p = start(tmp_path/'m.csv', '--checkpoint', store/'gen.safetensors')
    out,err = p.communicate(timeout=120)
    assert p.returncode == 2 and not out and names(tmp_path) == ['m.csv']
    assert [re.match(r'  line (\d+): ', o)[1] for o in err.splitlines()[1:]] == ['1', '2', '3'] and "did you mean 'crf'?" in err, err

def test_names_that_may_be_one_file(store, tmp_path):
    "Composed and decomposed letters, links, and case"
    a = dict(video=store/'c.mp4', audio=store/'c.wav'); (tmp_path/'link').symlink_to(tmp_path)
    for x,y in (('é.mp4', 'é.mp4'), ('a.mp4', 'A.mp4'), ('a.mp4', 'link/a.mp4'), ('a.mp4', 'b/../a.mp4')):
        with pytest.raises(ManifestError, match='line 2: output .* is also the output of line 1'): read_jobs([a | dict(output=tmp_path/x), a | dict(output=tmp_path/y)], store/'gen.safetensors')
    (tmp_path/'in.mp4').symlink_to(store/'c.mp4')
    with pytest.raises(ManifestError, match='is also the video of line 1'): read_jobs([a | dict(output=tmp_path/'in.mp4')], store/'gen.safetensors')

def setpriv(): return [shutil.which('setpriv'), '--bounding-set=-dac_override,-dac_read_search', '--inh-caps=-dac_override,-dac_read_search'] if os.geteuid() == 0 else []

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0 and not shutil.which('setpriv'), reason='root may write anywhere, and there is no setpriv')
def test_read_only_folder(store, tmp_path):
    "A folder that cannot be written is told before anything starts; one that becomes so later costs its own film only"
    (ro := tmp_path/'ro').mkdir(); ro.chmod(0o500)
    (tmp_path/'m.csv').write_text(f'video,audio,output\n{store}/c.mp4,{store}/c.wav,ro/x.mp4\n')
    try: _,err = (p := start(tmp_path/'m.csv', '--checkpoint', store/'gen.safetensors', pre=setpriv())).communicate(timeout=120)
    finally: ro.chmod(0o700)
    assert p.returncode == 2 and 'line 2: cannot write output' in err and 'ro cannot be written' in err, err
    jobs = read_jobs(tmp_path/'m.csv', store/'gen.safetensors'); ro.rmdir(); ro.touch()
    [r] = run_batch(jobs, workers=0)
    assert (r['status'], r['kind']) == ('failed', 'refused') and 'cannot write' in r['why']

def test_input_changed_meanwhile(store, tmp_path, monkeypatch):
    "A sound that is replaced while it is read gives no film that claims to be made of it"
    a = shutil.copy(store/'d.wav', tmp_path/'a.wav'); real = LipSync.dub
    @wraps(real)
    def dub(self, **kw): rep = real(self, **kw); write_audio(a, hum(.8)); return rep
    jobs = read_jobs([dict(video=store/'d.mp4', audio=a, output=tmp_path/'x.mp4')], store/'gen.safetensors')
    monkeypatch.setattr(LipSync, 'dub', dub)
    [r] = run_batch(jobs, workers=0)
    assert r['kind'] == 'refused' and 'was changed while it was read' in r['why'] and names(tmp_path) == ['a.wav']
