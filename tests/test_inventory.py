"Counting, checking and mending a collection: headers say what decoders would, and whatever is damaged is found and made again"
import os, random, shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from skimage.data import astronaut

from lipsync_nb.core import SR
from lipsync_nb.data.preprocess import preprocess
from lipsync_nb.data.structure import Clip, check_clip
from lipsync_nb.data.verify import completion, missing, remove_broken, verify
from lipsync_nb.media import _info, probe, write_video

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).parents[2]/'shared/data/real')

def coded(path, vcodec='libx264', acodec='aac', sr=44100, layout='stereo', pix_fmt='yuv420p', fps=25, n=30, options=None, **opts):
    "A film of `n` moving frames in any container and coding that PyAV can write"
    with av.open(str(path), 'w', options=options or {}) as c:
        v = c.add_stream(vcodec, rate=fps, options={k: str(o) for k,o in opts.items()}); v.width,v.height,v.pix_fmt = 160,128,pix_fmt
        a = c.add_stream(acodec, rate=sr, layout=layout); fmt = a.codec_context.format.name; ch = a.layout.nb_channels
        y,x = np.mgrid[:128,:160]
        for i in range(n): c.mux(v.encode(av.VideoFrame.from_ndarray(np.stack([(x+4*i)%256, y, x], -1).astype(np.uint8), format='rgb24')))
        c.mux(v.encode(None))
        step = a.codec_context.frame_size or 1024
        for i in range(0, n*sr//25, step):
            f = av.AudioFrame.from_ndarray(np.zeros((ch,step) if fmt[-1] == 'p' else (1,ch*step), np.float32 if fmt[:3] == 'flt' else np.int16), format=fmt, layout=layout)
            f.sample_rate,f.pts,f.time_base = sr,i,Fraction(1,sr)
            c.mux(a.encode(f))
        c.mux(a.encode(None))
    return path

CONTAINERS = [('a.mp4', {}), ('a.mov', dict(acodec='pcm_s16le')), ('a.mkv', dict(acodec='flac', layout='mono')), ('a.ts', {}), ('ac3.m2ts', dict(acodec='ac3')), ('a.flv', {}), ('a.3gp', dict(vcodec='mpeg4')),
    ('vp9.webm', dict(vcodec='libvpx-vp9', acodec='libopus', sr=48000, deadline='realtime', cpu_used=8)), ('vp8.webm', dict(vcodec='libvpx', acodec='libopus', sr=48000, deadline='realtime', cpu_used=8)),
    ('mpeg4.avi', dict(vcodec='mpeg4', acodec='pcm_s16le')), ('jpeg.avi', dict(vcodec='mjpeg', pix_fmt='yuvj420p', acodec='pcm_s16le')), ('mpeg1.mpg', dict(vcodec='mpeg1video', acodec='mp2', sr=48000)),
    ('mpeg2.mpg', dict(vcodec='mpeg2video', acodec='mp2', sr=48000)), ('mpeg2.ts', dict(vcodec='mpeg2video', acodec='mp2')), ('10 bit.mkv', dict(pix_fmt='yuv420p10le')), ('5.1.mp4', dict(layout='5.1', sr=48000)),
    ('ntsc.mp4', dict(fps=Fraction(30000,1001))), ('24.mkv', dict(fps=24)), ('parts.mp4', dict(options=dict(movflags='frag_keyframe+empty_moov'))), ('live.mkv', dict(options=dict(live='1')))]

@pytest.mark.parametrize('name,kw', CONTAINERS)
def test_header_says_what_decoders_say(tmp_path, name, kw):
    "`probe`, which lets no decoder start, against FFmpeg with all of them"
    p = coded(tmp_path/name, **kw)
    with av.open(str(p)) as c: full = _info(p, c)
    assert probe(p) == full and (full.width, full.height, full.has_audio) == (160, 128, True)
    assert full.sample_rate == kw.get('sr', 44100)
    assert check_clip(Clip('ann', p.stem, p), 0)[1:] == ('', '')            # also where the header counts no frames

@pytest.mark.skipif(not REAL.is_dir(), reason='no real clips: LIPSYNC_REAL_DATA names no folder')
def test_real_headers():
    for p in sorted(REAL.rglob('*.mp4'))[::20]:
        with av.open(str(p)) as c: assert probe(p) == _info(p, c)

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    "Four clips of two persons, one of them useless, and the folder that they were prepared in"
    d = tmp_path_factory.mktemp('inventory'); img = astronaut()
    t = np.arange(30*SR//25)/SR; hum = (.2*np.sin(300*np.pi*t)).astype(np.float32)
    for i,n in enumerate(('ann/a','ann/b','bob/a')):
        write_video(d/f'film/{n}.mp4', (img[:256, 90+10*i+round(5*np.sin(k/6)):][:,:256] for k in range(30)), audio=hum)
    write_video(d/'film/bob/mute.mp4', [img[:256,90:346]]*30)
    preprocess(d/'film', d/'out', workers=0)
    return d/'film', d/'out'

def tree(p): return {f.relative_to(p).as_posix(): f.read_bytes() for f in sorted(Path(p).rglob('*')) if f.is_file()}

def damage(rng, out):
    "Spoil one file of one clip, somehow; the clip's folder"
    f = rng.choice([p for p in out.glob('*/*') if (p/'crops.avi').exists()]); p = f/rng.choice(['crops.avi','mel.npy','track.npz'])
    b = bytearray(p.read_bytes()); i = rng.randrange(len(b))
    how = rng.choice(['flip','cut','add','drop','meta','verdict','empty'])
    if how == 'flip': b[i] ^= 1 << rng.randrange(8); p.write_bytes(b)
    elif how == 'cut': p.write_bytes(b[:i])
    elif how == 'add': p.write_bytes(b+b'x')
    elif how == 'drop': p.unlink()
    elif how == 'meta': m = f/'meta.json'; m.write_bytes(m.read_bytes()[:rng.randrange(1, m.stat().st_size-2)])
    elif how == 'verdict': (f/'meta.json').unlink()
    else: shutil.rmtree(f); f.mkdir()
    return f

def test_whatever_is_damaged_is_found_and_made_again(prepared, tmp_path):
    film,good = prepared
    want,rng = tree(good),random.Random(0)
    for k in range(25):
        out = tmp_path/str(k); shutil.copytree(good, out)
        hurt = {str(damage(rng, out)) for _ in range(rng.randint(1, 2))}
        r = verify(out, workers=0)
        assert set(r['broken']) == hurt, k
        assert set(remove_broken(r)) == hurt and verify(out, workers=0)['findings'] == {}
        assert missing(film, out)['n_missing'] == completion(film, out)['total']['missing'] == len(hurt)
        if k < 3: preprocess(film, out, workers=0); assert tree(out) == want
        shutil.rmtree(out)
