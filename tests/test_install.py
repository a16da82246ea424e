"`lipsync_doctor` without a folder: it runs where little else does, in a process of its own, and hands folders on to the data's doctor"
import inspect, json, os, subprocess, sys
from lipsync_nb import install
from lipsync_nb.data import doctor

def run(root, code, *args, **env): return subprocess.run([sys.executable, '-c', code, *args], cwd=root, capture_output=True, text=True, env={**os.environ, **env})

HIDDEN = '''
import sys
for o in ('torch','mediapipe','av','librosa','pandas','PIL'): sys.modules[o] = None
from lipsync_nb import install
'''

def test_it_runs_without_packages(root):
    "Every check still answers, in a sentence"
    r = run(root, HIDDEN + "import json; print(json.dumps([c._asdict() for c in install.check_installation()]))")
    assert r.returncode == 0 and 'Traceback' not in r.stderr, r.stderr
    found = {o['name']: o for o in json.loads(r.stdout.splitlines()[-1])}
    assert set(found) == set(install.CHECKS)
    assert all(found[k]['mark'] == 'stop' and len(found[k]['text'].splitlines()) == 1 for k in ('torch','films','sound'))
    assert found['Python']['mark'] == 'ok'

def test_a_folder_without_packages_is_a_sentence(root, tmp_path):
    r = run(root, HIDDEN + f"install.lipsync_doctor({str(tmp_path)!r})")
    assert r.returncode == 1 and 'call lipsync_doctor without a folder' in r.stderr.splitlines()[-1]

def command(root, *args, **env): return subprocess.run([sys.executable, '-m', 'lipsync_nb.install', *map(str, args)], cwd=root, capture_output=True, text=True, env={**os.environ, **env})

def test_exit_codes(root, tmp_path):
    "0 or 1 as the checks say, and the same in the file"
    r = command(root, '--json', tmp_path/'found.json', LIPSYNC_CONFIG=str(tmp_path/'config'))
    found = json.loads((tmp_path/'found.json').read_text(encoding='utf-8'))
    assert r.returncode == int(any(o['mark'] in ('stop','warn') for o in found)), r.stderr
    (tmp_path/'file').write_text('')
    r = command(root, LIPSYNC_CONFIG=str(tmp_path/'file'/'config'))
    assert r.returncode == 1 and 'another folder in LIPSYNC_CONFIG' in ' '.join(r.stdout.split())

def test_folders_go_to_the_doctor_of_data(root, tmp_path):
    r = command(root, tmp_path/'nowhere')
    assert r.returncode == 2 and r.stderr.startswith('lipsync_doctor: ') and 'is no folder' in r.stderr and 'Traceback' not in r.stderr

def test_both_doctors_take_the_same():
    def takes(f): return {k: v.default for k,v in inspect.signature(f).parameters.items() if k != 'out_dir'}
    assert takes(install.lipsync_doctor) == takes(doctor.lipsync_doctor)
