"Dubbing awkward inputs: the contract is kept, or one sentence says why not and nothing is written"
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.transform import resize

from lipsync_nb.core import SR, LipSyncError
from lipsync_nb.infer.core import LipSync, segments
from lipsync_nb.infer.film import Film
from lipsync_nb.infer.picture import Look, Picture, _planes
from lipsync_nb.infer.writer import PartWriter, join
from lipsync_nb.media import probe, read_audio, read_frames, save_image, write_video
from lipsync_nb.models.generator import Generator
from lipsync_nb.train.checkpoint import save_model

SCRIPT = Path(sys.executable).parent/'lipsync_infer'

def portrait(h=256, w=256): return (resize(astronaut()[:320,64:384], (h,w), anti_aliasing=True)*255).astype(np.uint8)

def face(n, h=256, w=256):
    "The portrait, moving by a pixel or two"
    im = portrait(h, w)
    for i in range(n): yield np.roll(im, (round(2*np.sin(i/5)), round(2*np.cos(i/7))), (0,1))

def sound(seconds, sr=SR, channels=1):
    t = np.arange(round(seconds*sr))/sr
    return np.stack([.2*np.sin(2*np.pi*(220+110*c)*t)*np.sin(4*np.pi*t).clip(0) for c in range(channels)], 1).astype(np.float32)

def wav(path, seconds, sr=SR, channels=1):
    "A PCM file of any rate and number of channels"
    layout = {1:'mono', 2:'stereo', 6:'5.1'}[channels]
    with av.open(str(path), 'w') as c:
        a = c.add_stream('pcm_s16le', rate=sr, layout=layout)
        x = (sound(seconds, sr, channels)*32767).astype(np.int16)
        f = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.reshape(1, -1)), format='s16', layout=layout)
        f.sample_rate,f.pts = sr,0
        c.mux(a.encode(f)); c.mux(a.encode(None))
    return path

def times(path): return np.array([t for t,_ in read_frames(path)])

@pytest.fixture(scope='module')
def lip():
    torch.manual_seed(0)
    return LipSync(gen=Generator.from_preset('demo'), batch=16)

@pytest.fixture(scope='module')
def store(tmp_path_factory, lip):
    "A checkpoint, a clip with sound, and things that are none"
    d = tmp_path_factory.mktemp('store')
    save_model(lip.gen, d/'gen.safetensors')
    write_video(d/'clip.mp4', face(30), audio=sound(1.2))
    write_video(d/'mute.mp4', face(3))
    write_video(d/'grey.mp4', [np.full((96,96,3), 99, np.uint8)]*5, audio=sound(.2))
    (d/'text.mp4').write_text('no video at all '*99)
    (d/'empty.mp4').write_bytes(b'')
    whole = (d/'clip.mp4').read_bytes()
    (d/'torn.mp4').write_bytes(whole[:len(whole)//3])
    wav(d/'sound.wav', .5)
    return d

def refused(lip, out, video, audio, output=None):
    "The sentence with which dubbing is refused; checks that nothing is left behind"
    with pytest.raises(LipSyncError) as e: lip.dub(video, audio, output or out/'x.mp4')
    msg = str(e.value)
    assert '\n' not in msg and 20 < len(msg) < 400
    assert not list(out.iterdir())
    return msg

@pytest.mark.parametrize('video,audio,says', [
    ('none.mp4', 'clip.mp4', 'does not exist'), ('clip.mp4', 'none.wav', 'does not exist'),
    ('text.mp4', 'clip.mp4', 'cannot be read'), ('clip.mp4', 'text.mp4', 'cannot be read'),
    ('empty.mp4', 'clip.mp4', '0 bytes'),       ('clip.mp4', 'empty.mp4', '0 bytes'),
    ('.', 'clip.mp4', 'folder'),                ('clip.mp4', '.', 'folder'),
    ('grey.mp4', 'clip.mp4', 'no face'),        ('clip.mp4', 'mute.mp4', 'no sound'),
    ('sound.wav', 'clip.mp4', 'no picture'),    ('torn.mp4', 'clip.mp4', 'torn.mp4')])
def test_refused(lip, store, tmp_path, video, audio, says):
    assert says in refused(lip, tmp_path, store/video, store/audio)

@pytest.mark.parametrize('name,says', [('clip.mp4/below/x.mp4', 'cannot write'), ('clip.mp4', 'also an input'), ('x.avi', '.mp4')])
def test_bad_output(lip, store, tmp_path, name, says):
    assert says in refused(lip, tmp_path, store/'clip.mp4', store/'clip.mp4', store/name)

@pytest.mark.skipif(not Path('/sys/kernel').is_dir(), reason='needs a file system that nobody can write to')
def test_read_only_folder(lip, store):
    with pytest.raises(LipSyncError, match='cannot write'): lip.dub(store/'clip.mp4', store/'clip.mp4', '/sys/kernel/x.mp4')

def test_full_disk(store, tmp_path):
    "No file may grow beyond a limit: the system says so in the middle of a segment, and nothing stays"
    code = ('import resource, signal, sys; from lipsync_nb.infer.core import lipsync_infer, LipSync; from lipsync_nb.core import LipSyncError\n'
            'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60_000,)*2)\n'
            'lip = LipSync(sys.argv[1], batch=16)\n'
            'try: lip.dub(sys.argv[2], sys.argv[2], sys.argv[3], crf=0)\n'
            'except LipSyncError as e: print("SAID", e)')
    r = subprocess.run([sys.executable, '-c', code, str(store/'gen.safetensors'), str(store/'clip.mp4'), str(tmp_path/'x.mp4')], capture_output=True, text=True)
    assert 'SAID cannot write' in r.stdout and 'x.mp4' in r.stdout, r.stdout + r.stderr
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('n,h,w,fps', [(12,255,257,25), (20,200,320,30), (40,256,256,60), (10,256,256,10), (30,256,256,120), (1,256,256,25), (2,256,256,25)])
def test_frames_kept(lip, store, tmp_path, n, h, w, fps):
    src = write_video(tmp_path/'src.mp4', (np.pad(f, ((0,0),(0,max(0,w-h)),(0,0)), mode='edge')[:,:w] for f in face(n, h, h)), fps=fps)
    rep = lip.dub(src, store/'clip.mp4', tmp_path/'out.mp4')
    i = probe(tmp_path/'out.mp4')
    assert (i.width, i.height, rep['frames'], rep['dubbed']) == (w, h, n, n)
    assert np.allclose(times(tmp_path/'out.mp4'), times(src), atol=1e-6)
    assert abs(len(read_audio(tmp_path/'out.mp4'))/SR - n/fps) < .07

def test_variable_rate(lip, store, tmp_path):
    at = np.cumsum([0]+[.02,.05,.11]*6)
    src = write_video(tmp_path/'src.mp4', face(len(at)), times=at)
    lip.dub(src, store/'clip.mp4', tmp_path/'out.mp4')
    assert np.allclose(times(tmp_path/'out.mp4'), at, atol=1e-4) and np.allclose(times(tmp_path/'out.mp4'), times(src), atol=1e-6)

def test_rotated(lip, store, tmp_path):
    with av.open(str(tmp_path/'src.mp4'), 'w') as c:
        v = c.add_stream('libx264', rate=25); v.width,v.height,v.pix_fmt = 256,192,'yuv420p'
        v.set_display_rotation(90)
        for f in face(6): c.mux(v.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(f[:,:192], -1)), format='rgb24')))
        c.mux(v.encode(None))
    rep = lip.dub(tmp_path/'src.mp4', store/'clip.mp4', tmp_path/'out.mp4')
    assert (rep['dubbed'], rep['video']['width'], rep['video']['height']) == (6, 192, 256)
    assert next(read_frames(tmp_path/'out.mp4'))[1].shape == (256,192,3)
    assert probe(tmp_path/'out.mp4').width == 256                                              # turned by the player, as the source is

def film(path, pics, fps=25, lossless=True):
    "A film of pictures as they are"
    pics = list(pics); f = pics[0].frame
    look = Look(f.width, f.height, f.format.name, f.colorspace, f.color_range, f.color_trc, f.color_primaries, pics[0].turn, (1,1), 90_000)
    with PartWriter(path.with_suffix('.part.mp4'), look, lossless=lossless) as w:
        for i,p in enumerate(pics): w.write(p, i*90_000//fps)
    return join([path.with_suffix('.part.mp4')], np.arange(len(pics))*90_000//fps, path, look)

@pytest.mark.parametrize('fmt,rng,trc', [('yuv420p10le',1,1), ('yuv420p10le',1,16), ('yuv420p10le',1,18), ('yuv420p',2,1), ('yuv422p',1,1), ('yuv444p',1,13)])
def test_depth_range_and_tags_are_kept(lip, store, tmp_path, fmt, rng, trc):
    "Ten bits, HDR, full range: kept, and without loss every sample outside of the face is the source's"
    from lipsync_nb.infer.picture import untone
    hdr = {16:'PQ', 18:'HLG'}.get(trc)
    def pic(f):
        if hdr: v = av.VideoFrame.from_ndarray((untone(f, hdr)*65535).astype(np.uint16), format='rgb48le').reformat(format=fmt, dst_colorspace=9, dst_color_range=1)
        else: v = av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format='rgb24').reformat(format=fmt, dst_colorspace='ITU709', dst_color_range=rng)
        v.colorspace,v.color_range,v.color_trc,v.color_primaries = 9 if hdr else 1,rng,trc,9 if hdr else 1
        return Picture(v, 0)
    src = film(tmp_path/'src.mp4', map(pic, face(8)))
    rep = lip.dub(src, store/'clip.mp4', tmp_path/'out.mp4', lossless=True)
    assert rep['dubbed'] == 8 and Film(tmp_path/'out.mp4').look == Film(src).look
    changed = []
    for (_,a),(_,b) in zip(Film(src), Film(tmp_path/'out.mp4')):
        for x,y in zip(_planes(a.frame), _planes(b.frame)):
            same = x == y; h,w = same.shape; changed.append(1-same.mean())
            assert same[:h//4].all() and same[:,:w//8].all()
    assert 0 < max(changed) < .5

def test_gif(lip, store, tmp_path):
    "A GIF, with a palette and a rate of its own"
    from PIL import Image
    ims = [Image.fromarray(f) for f in face(6)]
    ims[0].save(tmp_path/'a.gif', save_all=True, append_images=ims[1:], duration=80, loop=0)
    assert lip.dub(tmp_path/'a.gif', store/'clip.mp4', tmp_path/'out.mp4')['frames'] == len(times(tmp_path/'a.gif')) > 2
    assert np.allclose(times(tmp_path/'out.mp4'), times(tmp_path/'a.gif'), atol=1e-6)

def test_truncated(lip, store, tmp_path):
    "A file whose end is missing: its frames up to there, or a sentence; never a half-written film"
    raw = (store/'clip.mp4').read_bytes(); (tmp_path/'cut.mp4').write_bytes(raw[:int(len(raw)*.7)])
    try: rep = lip.dub(tmp_path/'cut.mp4', store/'clip.mp4', tmp_path/'out.mp4')
    except LipSyncError as e: assert 'damaged' in str(e) and not (tmp_path/'out.mp4').exists()
    else: assert rep['frames'] == len(times(tmp_path/'out.mp4')) == len(times(tmp_path/'cut.mp4'))
    assert {o.name for o in tmp_path.iterdir()} <= {'cut.mp4','out.mp4'}

def test_face_leaves_and_returns(lip, store, tmp_path):
    src = write_video(tmp_path/'src.mp4', (np.zeros_like(f) if 10 <= i < 14 else f for i,f in enumerate(face(24))))
    rep = lip.dub(src, store/'clip.mp4', tmp_path/'out.mp4')
    assert [(s['first'], s['last']) for s in rep['spans']] == [(10,13)] and rep['frames'] == 24

@pytest.mark.parametrize('seconds', [.3, 1., 5.])
def test_lengths(lip, store, tmp_path, seconds):
    a = wav(tmp_path/'a.wav', seconds)
    assert lip.dub(store/'clip.mp4', a, tmp_path/'v.mp4')['frames'] == 30                       # as long as the video
    assert abs(len(read_audio(tmp_path/'v.mp4'))/SR - 1.2) < .07
    rep = lip.dub(store/'clip.mp4', a, tmp_path/'a.mp4', follow='audio')                         # as long as the sound
    assert rep['frames'] == len(times(tmp_path/'a.mp4')) == np.ceil(round(seconds*25, 3))
    frames = [f.astype(int) for _,f in read_frames(tmp_path/'a.mp4')]
    assert max(np.abs(a-b)[:80].mean() for a,b in zip(frames, frames[1:])) < 12                  # to and fro: no leap

@pytest.mark.parametrize('sr,channels', [(8000,1), (48_000,6), (44_100,2), (37_800,1)])
def test_sounds(lip, store, tmp_path, sr, channels):
    a = wav(tmp_path/'a.wav', 1.2, sr, channels)
    lip.dub(store/'clip.mp4', a, tmp_path/'out.mp4')
    i = probe(tmp_path/'out.mp4')
    assert (i.sample_rate, i.channels) == (sr if sr != 37_800 else 48_000, min(channels, 2))
    got,want = read_audio(tmp_path/'out.mp4'),read_audio(a)
    lag = np.correlate(np.pad(got, 400), want[:16_000], 'valid')[:800].argmax() - 400
    assert abs(lag) <= 80                                                                        # 5 ms

def test_still_and_names(lip, store, tmp_path):
    d = tmp_path/'zażółć 顔'; d.mkdir()
    save_image(d/'-face.png', portrait(256, 255))
    rep = lip.dub(d/'-face.png', wav(d/'-só.wav', .6), d/'-out.mp4')
    assert (rep['frames'], rep['faces'][0]['references']['0']['least_distance']) == (15, 0)
    assert sorted(o.name for o in d.iterdir()) == ['-face.png', '-out.mp4', '-só.wav']

def run(*args): return subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, env={**os.environ, 'LIPSYNC_QUIET':'1'})

@pytest.mark.skipif(not SCRIPT.exists(), reason='the package is not installed')
def test_console(store, tmp_path):
    args = ['--checkpoint', store/'gen.safetensors', '--video', store/'clip.mp4', '--audio', store/'clip.mp4']
    r = run(*args, '--output', tmp_path/'x.mp4', '--report', tmp_path/'x.json')
    assert r.returncode == 0 and '30 of 30 frames dubbed' in r.stdout, r.stderr
    assert sorted(o.name for o in tmp_path.iterdir()) == ['x.json', 'x.mp4']
    shutil.rmtree(tmp_path); tmp_path.mkdir()
    for bad,says in ((args, '--output is missing'), ([*args[:3], store/'grey.mp4', *args[4:], '--output', tmp_path/'x.mp4'], 'no face')):
        r = run(*bad)
        assert r.returncode == 2 and says in r.stderr and r.stderr.count('\n') == 1, r.stderr
    assert not list(tmp_path.iterdir())

@pytest.mark.skipif(not SCRIPT.exists() or os.name == 'nt', reason='needs the installed command and POSIX signals')
def test_interrupt(store, tmp_path):
    a = wav(tmp_path/'a.wav', 300)
    p = subprocess.Popen([SCRIPT, '--checkpoint', store/'gen.safetensors', '--video', store/'clip.mp4', '--audio', a, '--follow', 'audio', '--output', tmp_path/'x.mp4'],
        stderr=subprocess.PIPE, text=True, env={**os.environ, 'LIPSYNC_QUIET':'1'})
    while p.poll() is None and not list(tmp_path.glob('.*.parts*/.part*.mp4')): time.sleep(.1)
    p.send_signal(signal.SIGINT)
    assert 'interrupted' in p.communicate()[1] and p.returncode == 2
    assert [o.name for o in tmp_path.iterdir()] == ['a.wav']


def hashes(path): return [hash(p.rgb().tobytes()) for _,p in Film(path)]

@pytest.mark.skipif(not SCRIPT.exists() or os.name == 'nt', reason='needs the installed command and POSIX signals')
def test_kill_and_resume(store, tmp_path):
    "kill -9 while a long film is rendered, several times; what is resumed ends as the film that nobody disturbed"
    def args(out): return [str(o) for o in (SCRIPT, '--checkpoint', store/'gen.safetensors', '--video', store/'clip.mp4', '--audio', tmp_path/'a.wav', '--follow', 'audio', '--output', out, '--batch', 16, '--resume')]
    wav(tmp_path/'a.wav', 62); env = {**os.environ, 'LIPSYNC_QUIET':'1', 'OMP_NUM_THREADS':'1'}
    parts = lambda: sorted(o.name for o in (tmp_path/'.x.parts').glob('part*.mp4'))
    had = []
    for n in (1, 2, 4):
        p = subprocess.Popen(args(tmp_path/'x.mp4'), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); until = time.time()+120
        while p.poll() is None and len(parts()) < n and time.time() < until: time.sleep(.02)
        p.kill(); p.wait(); had.append(len(parts())); assert not (tmp_path/'x.mp4').exists()
    assert had == sorted(had) and 0 < had[0] < had[-1] < len(segments(62*25, 250)), had
    r = subprocess.run(args(tmp_path/'x.mp4'), env=env, capture_output=True, text=True); assert r.returncode == 0, r.stderr
    subprocess.run(args(tmp_path/'y.mp4'), env=env, check=True, capture_output=True)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['a.wav','x.mp4','y.mp4']
    a,b = hashes(tmp_path/'x.mp4'),hashes(tmp_path/'y.mp4')
    assert len(a) == 62*25 and a == b
    assert np.array_equal(read_audio(tmp_path/'x.mp4'), read_audio(tmp_path/'y.mp4'))
