"Preparing clips: awkward films are prepared rightly or refused for the right reason, and a killed run loses nothing"
import json, os, random, re, shutil, signal, subprocess, sys, time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from lipsync_nb.core import FPS, SR
from lipsync_nb.data.clip import PreprocessCfg, process_clip
from lipsync_nb.data.folder import CropReader, load_meta, load_track
from lipsync_nb.data.preprocess import preprocess
from lipsync_nb.data.structure import Clip, check_clip, find_clips
from lipsync_nb.media import write_video

SCRIPT = Path(sys.executable).parent/'lipsync_preprocess'

def head(t, h=256, w=256, zoom=1.):
    "The portrait at `t` seconds: it sways by a few pixels"
    s = zoom*min(h, w)/256
    m = cv2.getRotationMatrix2D((225,120), 4*np.sin(2*t), s)
    m[:,2] += np.array([w/2,h*.55]) - (225,120) + (s*8*np.sin(3*t), s*4*np.cos(2*t))
    return cv2.warpAffine(astronaut(), m, (w,h), borderMode=cv2.BORDER_REFLECT)

def hum(seconds, sr=SR): t = np.arange(round(seconds*sr))/sr; return (.2*np.sin(300*np.pi*t)*(np.sin(4*np.pi*t) > 0)).astype(np.float32)

def film(path, seconds=1.6, fps=FPS, h=256, w=256, sound=True, **kw):
    return write_video(path, (head(float(i/fps), h, w) for i in range(round(seconds*fps))), fps=fps, audio=hum(seconds) if sound else None, **kw)

def raw(path, seconds=1.6, vcodec='libx264', pix_fmt='yuv420p', acodec='aac', sr=44100, layout='stereo', rotate=0, late=0., h=256, w=256, fps=25, **opts):
    "A film in any container and coding that PyAV can write; `late` seconds of silence stand before the sound in its own clock"
    with av.open(str(path), 'w') as c:
        v = c.add_stream(vcodec, rate=fps, options={k: str(o) for k,o in opts.items()}); v.width,v.height,v.pix_fmt = w,h,pix_fmt
        if rotate: v.set_display_rotation(rotate)
        a = c.add_stream(acodec, rate=sr, layout=layout)
        for i in range(round(seconds*fps)): c.mux(v.encode(av.VideoFrame.from_ndarray(head(i/fps, h, w) if not rotate else np.ascontiguousarray(np.rot90(head(i/fps, w, h), -rotate//90)), format='rgb24')))
        c.mux(v.encode(None))
        x = np.repeat(hum(seconds, sr)[None], a.layout.nb_channels, 0)
        fmt = a.codec_context.format.name; step = a.codec_context.frame_size or 1024
        for i in range(0, x.shape[1], step):
            b = x[:,i:i+step]; b = b if fmt == 'fltp' else b.T.reshape(1, -1)
            f = av.AudioFrame.from_ndarray(np.ascontiguousarray(b if fmt[:3] == 'flt' else (b*32767).astype(np.int16)), format=fmt, layout=layout)
            f.sample_rate,f.pts,f.time_base = sr,round(late*sr)+i,Fraction(1,sr)
            c.mux(a.encode(f))
        c.mux(a.encode(None))
    return path

def prepared(path, out, **kw):
    "Prepare one film; its `meta.json` and its folder"
    m = process_clip(Clip('ann', path.stem, path), path.parent, out, PreprocessCfg(**kw))
    return m, out/'ann'/path.stem

def whole(m, folder, seconds=1.6, slack=2, steady=.5):
    "The folder is accepted, complete, and as long as the film"
    assert m['status'] == 'accepted', m['reason']
    n = m['n_frames']
    assert abs(n - seconds*FPS) <= slack
    assert sorted(p.name for p in folder.iterdir()) == ['crops.avi', 'mel.npy', 'meta.json', 'track.npz']
    mel,t,r = np.load(folder/'mel.npy'),load_track(folder),CropReader(folder)
    assert mel.shape == (4*n,80) and len(r) == n and all(len(v) == n for v in t.values()) and m['n_valid'] == n
    assert t['valid'].all() and m['quality']['jitter'] < steady
    assert mel.max() > 0                                    # the sound is there
    return r, t, mel

@pytest.mark.parametrize('name,kw', [
    ('24.mp4', dict(fps=24)), ('ntsc.mp4', dict(fps=Fraction(30000,1001))), ('50.mp4', dict(fps=50)), ('12.mp4', dict(fps=12.5)),
    ('odd.mp4', dict(h=251, w=255)), ('wide.mp4', dict(h=256, w=640)), ('tall.mp4', dict(h=640, w=256)), ('large.mp4', dict(h=1080, w=1920, seconds=1.2)),
    ('name with spaces — ünï.mp4', {})])
def test_rates_and_sizes(tmp_path, name, kw):
    p = film(tmp_path/name, **kw)
    whole(*prepared(p, tmp_path/'out'), kw.get('seconds', 1.6), steady=1 if name == '12.mp4' else .5) # 12.5 pictures a second: the head moves in jerks

@pytest.mark.parametrize('name,kw', [
    ('vp9.webm', dict(vcodec='libvpx-vp9', acodec='libopus', sr=48000, deadline='realtime', cpu_used=8)), ('mpeg4.avi', dict(vcodec='mpeg4', acodec='pcm_s16le')),
    ('mpeg2.mpg', dict(vcodec='mpeg2video', acodec='mp2', sr=48000)), ('stream.ts', {}), ('quick.mov', dict(acodec='pcm_s16le')), ('box.mkv', dict(acodec='flac', layout='mono')),
    ('ten bit.mkv', dict(pix_fmt='yuv420p10le')), ('full colour.mp4', dict(pix_fmt='yuv444p')), ('surround.mkv', dict(layout='5.1', sr=48000)), ('telephone.mkv', dict(sr=8000, layout='mono', acodec='pcm_s16le')),
    ('turned.mp4', dict(rotate=90, h=240, w=320)), ('upside down.mp4', dict(rotate=180))])
def test_containers_and_codings(tmp_path, name, kw):
    p = raw(tmp_path/name, **kw)
    r,t,_ = whole(*prepared(p, tmp_path/'out'))
    eyes = t['landmarks'][:,[33,263]].mean(0)
    assert eyes[1,0] > eyes[0,0] + abs(eyes[1,1]-eyes[0,1])                 # upright: the eyes lie side by side, in order

def test_variable_rate_keeps_time(tmp_path):
    times = np.cumsum([0] + [.02,.05,.05]*13)                             # 1.56 s, 40 frames
    p = write_video(tmp_path/'vfr.mp4', (head(t) for t in times), times=times, audio=hum(1.6))
    _,t,_ = whole(*prepared(p, tmp_path/'out'), seconds=times[-1]+.05)
    steady,_f = prepared(film(tmp_path/'cfr.mp4'), tmp_path/'out')
    a,b = t['landmarks'][:,168],load_track(_f)['landmarks'][:,168]
    n = min(len(a), len(b)); assert np.abs(a[:n]-b[:n]).max() < 1.5       # the head is where it was at that moment

def test_late_sound_keeps_its_place(tmp_path):
    _,_,mel = whole(*prepared(raw(tmp_path/'late.mkv', acodec='pcm_s16le', sr=SR, layout='mono', late=.4), tmp_path/'out'))
    assert mel[:38].max() == -1 and mel[42:60].max() > 0

@pytest.mark.parametrize('name,kind', [('mute','no sound'), ('short','too short'), ('picture','no picture'), ('noface','no face'), ('lost','face lost'), ('small','small face'),
    ('quiet','silent'), ('half sound','sound too short'), ('torn','unreadable'), ('head only','unreadable'), ('text','unreadable'), ('zero','zero bytes'), ('gone','unreadable')])
def test_refused(tmp_path, name, kind):
    p = tmp_path/f'{name}.mp4'
    if name == 'mute': film(p, sound=False)
    if name == 'short': film(p, seconds=.8)
    if name == 'noface': write_video(p, [np.full((128,128,3), 80, np.uint8)]*40, audio=hum(1.6))
    if name == 'lost': write_video(p, (cv2.warpAffine(astronaut(), np.float32([[1,0,-97-280*np.sin(np.pi*np.clip((i-10)/20, 0, 1))],[0,1,20]]), (256,256)) for i in range(40)), audio=hum(1.6)) # the camera swings away and back
    if name == 'small': write_video(p, (head(i/25, 96, 96, .55) for i in range(40)), audio=hum(1.6))
    if name == 'quiet': write_video(p, (head(i/25) for i in range(40)), audio=hum(1.6)*1e-4)
    if name == 'half sound': write_video(p, (head(i/25) for i in range(40)), audio=hum(.8))
    if name in ('torn','head only'): b = film(p).read_bytes(); p.write_bytes(b[:len(b)//2 if name == 'torn' else 900])
    if name == 'text': p.write_text('no film'*99)
    if name == 'zero': p.touch()
    if name == 'gone': p.symlink_to(tmp_path/'nowhere.mp4')
    if name == 'picture':
        with av.open(str(p), 'w') as c:
            a = c.add_stream('aac', rate=SR, layout='mono'); f = av.AudioFrame.from_ndarray(hum(1.6)[None], format='fltp', layout='mono'); f.sample_rate,f.pts = SR,0
            c.mux(a.encode(f)); c.mux(a.encode(None))
    m,folder = prepared(p, tmp_path/'out')
    assert (m['status'],m['kind']) == ('rejected',kind), m
    assert 15 < len(m['reason']) < 300 and '\n' not in m['reason']
    assert [o.name for o in folder.iterdir()] == ['meta.json']

def tree(p): return {f.relative_to(p).as_posix(): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}

@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "Seven clips of three persons, one of them mute, and what an undisturbed run makes of them"
    d = tmp_path_factory.mktemp('films')
    a = film(d/'a.mp4', seconds=2); b = film(d/'b.mp4', seconds=1.2, sound=False)
    for i in range(6): (d/f'film/p{i%3}').mkdir(parents=True, exist_ok=True); shutil.copy(a, d/f'film/p{i%3}/c{i}.mp4')
    shutil.copy(b, d/'film/p2/mute.mp4')
    s = preprocess(d/'film', d/'calm', workers=2)
    assert (s['accepted'],s['rejected']) == (6,1)
    return d

def run(d, out): return subprocess.Popen([SCRIPT, d/'film', out, '--workers', '2'], env={**os.environ, 'LIPSYNC_QUIET':'1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

def children(pid):
    try: return [int(c) for c in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except OSError: return []

def wait_for(cond, seconds=60):
    end = time.time()+seconds
    while not cond():
        assert time.time() < end, 'waited in vain'
        time.sleep(.02)

@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_killed_at_any_moment(films, tmp_path):
    "Kill the whole run again and again; what it leaves is whole, and in the end all is as if nothing had happened"
    out,rng = tmp_path/'out',random.Random(0)
    for _ in range(int(os.environ.get('LIPSYNC_KILLS', 4))):                # the benchmark kills more often
        p = run(films, out); n = len(list(out.glob('*/*/meta.json')))
        wait_for(lambda: p.poll() is not None or len(list(out.glob('*/.*.tmp*'))) or len(list(out.glob('*/*/meta.json'))) > n)
        time.sleep(rng.uniform(0, .8))
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        for f in out.glob('*/[!.]*'): assert load_meta(f) and all((f/k).stat().st_size == b['size'] for k,b in load_meta(f).get('files', {}).items())
    p = run(films, out); assert p.communicate()[0] and p.returncode == 0
    assert tree(out) == tree(films/'calm')

@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_killed_worker(films, tmp_path):
    "A worker that is killed costs no clip: its clip is prepared by another one"
    out = tmp_path/'out'; p = run(films, out)
    wait_for(lambda: list(out.glob('*/.*.tmp*')))
    tmp = next(out.glob('*/.*.tmp*')); os.kill(int(re.search(r'\.tmp(\d+)', tmp.name)[1]), signal.SIGKILL)
    assert p.wait(120) == 0
    preprocess(films/'film', out, workers=0)                                # sweeps what the dead worker left
    assert tree(out) == tree(films/'calm')

def test_interrupted(films, tmp_path):
    "Ctrl-C: one sentence, exit 2, nothing half-written"
    out = tmp_path/'out'; p = run(films, out)
    wait_for(lambda: list(out.glob('*/*/meta.json')))
    os.killpg(p.pid, signal.SIGINT)
    _,err = p.communicate(timeout=60)
    said = [o for o in err.splitlines() if not re.match(r'[IW]\d{4} |INFO: |WARNING: All log', o)]    # what C++ threads of a worker say while it ends is not ours
    assert p.returncode == 2 and len(said) == 1 and 'interrupted' in said[0], err
    assert not list(out.glob('*/.*')), 'a temporary folder was left'
    assert preprocess(films/'film', out, workers=2)['accepted'] == 6
    assert tree(out) == tree(films/'calm')

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A scheduler and two worker machines, as somebody would start them by hand; gives the scheduler's address"
    pytest.importorskip('distributed', reason='the extra `scale` is not installed')
    d = tmp_path_factory.mktemp('cluster'); exe = str(Path(sys.executable).parent/'dask'); env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    def start(*a): return subprocess.Popen([exe, *a], cwd=d, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    jobs = [start('scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', str(d/'s.json'))]
    try:
        wait_for((d/'s.json').exists)
        address = json.loads((d/'s.json').read_text())['address']
        jobs += [start('worker', address, '--host', '127.0.0.1', '--nthreads', '1', '--no-dashboard', '--local-directory', str(d/f'w{i}')) for i in range(2)]
        yield address
    finally:
        for j in jobs: os.killpg(j.pid, signal.SIGKILL); j.wait()

@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_many_machines(films, cluster, tmp_path):
    "Two workers of a real scheduler prepare a collection; one is killed in the middle of a clip: nothing is lost, nothing differs"
    out = tmp_path/'out'
    p = subprocess.Popen([SCRIPT, films/'film', out, '--scheduler', cluster], env={**os.environ, 'LIPSYNC_QUIET':'1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: p.poll() is not None or list(out.glob('*/.*.tmp*')))
    tmp = next(out.glob('*/.*.tmp*')); os.kill(int(re.search(r'\.tmp(\d+)', tmp.name)[1]), signal.SIGKILL)
    said,err = p.communicate(timeout=240)
    assert p.returncode == 0, err
    assert '6 accepted' in said and '1 rejected' in said
    assert preprocess(films/'film', out, workers=0)['skipped'] == 7             # sweeps what the dead worker left
    assert tree(out) == tree(films/'calm')

def test_two_runs_at_once(films, tmp_path):
    "Two runs over one folder at the same time end in the same tree as one"
    out = tmp_path/'out'; ps = [run(films, out) for _ in range(2)]
    for p in ps: assert p.wait(240) == 0, p.stderr.read()
    assert tree(out) == tree(films/'calm')

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).resolve().parents[2]/'shared/data/real')

@pytest.mark.skipif(not REAL.is_dir(), reason='no real clips: set LIPSYNC_REAL_DATA to a folder of person/clip.mp4')
def test_real_clips(tmp_path):
    "Real clips, a few of the shortest of different persons: a face in nearly every frame, and a steady crop"
    first = {c.person: c for c in reversed(find_clips(REAL))}.values()
    some = sorted((c for c in first if not check_clip(c)[1]), key=lambda c: c.path.stat().st_size)[:6]
    for c in some:
        m = process_clip(c, REAL, tmp_path/'out')
        assert m['status'] == 'accepted', m['reason']
        assert m['quality']['face_share'] >= .95 and m['quality']['jitter'] <= .5
