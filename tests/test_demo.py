"A demo corpus whose making was killed: what is there is whole, and the next call makes the rest, the same"
import hashlib, os, signal, subprocess, sys, time
import pytest
pytest.importorskip('espeakng_loader'); pytest.importorskip('skimage'); pytest.importorskip('mediapipe')

MAKE = '''
import sys
from lipsync_nb.demo import make_corpus
if __name__ == '__main__': make_corpus(sys.argv[1], n_persons=2, n_clips=3, seed=4, workers=int(sys.argv[2]))
'''

def start(script, dest, workers):
    env = {**os.environ, 'LIPSYNC_QUIET': '1', 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, script, dest, str(workers)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def digests(dest): return {str(p.relative_to(dest)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(dest.rglob('*')) if p.is_file() and p.name[0] != '.'}

def test_a_killed_corpus_is_whole_and_goes_on(tmp_path):
    from lipsync_nb.demo import load_truth
    from lipsync_nb.media import read_frames
    script = tmp_path/'make.py'; script.write_text(MAKE)
    killed,whole = tmp_path/'killed',tmp_path/'whole'
    p = start(script, killed, 1); end = time.monotonic()+120
    while not list(killed.glob('p0/c01.truth.json')) and time.monotonic() < end and p.poll() is None: time.sleep(.01)
    p.send_signal(signal.SIGKILL); p.wait()
    clips = list(killed.glob('*/[!.]*.mp4'))
    assert clips and len(clips) < 6, 'the run was to be killed between its first clip and its last'
    for c in clips: assert len(list(read_frames(c))) == len(load_truth(c)['opening'])
    for dest,workers in ((killed,1), (whole,2)):
        p = start(script, dest, workers); _,err = p.communicate(timeout=240)
        assert p.returncode == 0, err
    assert len(digests(whole)) == 30
    assert digests(killed) == digests(whole)
