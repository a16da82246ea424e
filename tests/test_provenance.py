"Marks: the command in a process of its own, certificates made at once, a missing library, no network, full disks, little memory, any changed bit"
import io, json, os, re, shutil, socket, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest

from lipsync_nb.core import LipSyncError
from lipsync_nb.media import probe, read_frames, write_video

c2pa = pytest.importorskip('c2pa', reason='c2pa-python is not installed')
pytest.importorskip('cryptography')
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec

from lipsync_nb.infer import provenance
from lipsync_nb.infer.certificate import _issue, c2pa_context, local_certificate
from lipsync_nb.infer.provenance import MARK, check_mark, mark_video

REAL = Path(os.environ.get('LIPSYNC_REAL_DATA') or Path(__file__).parents[2]/'shared/data/real')

@pytest.fixture(autouse=True)
def config(tmp_path_factory, monkeypatch):
    "A config folder of the tests' own, made once"
    d = tmp_path_factory.getbasetemp()/'config'
    monkeypatch.setenv('LIPSYNC_CONFIG', str(d))
    return d

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "A film as the writer leaves it, its source, and a certificate with its root"
    d,rng = tmp_path_factory.mktemp('store'),np.random.default_rng(0)
    write_video(d/'plain.mp4', (rng.integers(0, 255, (64,64,3), np.uint8) for _ in range(12)), comment=MARK)
    write_video(d/'source.mp4', (rng.integers(0, 255, (64,64,3), np.uint8) for _ in range(12)))
    root_key,key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _issue(root_key, 'A root')
    (d/'root.pem').write_bytes(root.public_bytes(pem.Encoding.PEM))
    (d/'cert.pem').write_bytes(_issue(key, 'A signer', (root, root_key)).public_bytes(pem.Encoding.PEM)
        + key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    return d

def python(code, *args, **env):
    "Run code in a fresh process"
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env={**os.environ, **env})

def command(tmp_path, *args):
    "Run `lipsync_provenance` as its console script does"
    script = tmp_path/'run.py'
    script.write_text('import sys\nfrom lipsync_nb.infer.provenance import lipsync_provenance\nsys.exit(lipsync_provenance())\n')
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)

def test_command(store, tmp_path):
    mark_video(store/'plain.mp4', tmp_path/'own.mp4', store/'source.mp4', cert=store/'cert.pem', model='c0ffee')
    r = command(tmp_path, 'own.mp4', '--trust', store/'root.pem', '--json', 'own.json')
    assert (r.returncode, r.stderr) == (0, '')
    assert r.stdout.startswith('own.mp4: marked and intact\n') and 'A signer' in r.stdout and 'whose root you trust' in r.stdout and 'model c0ffee' in r.stdout
    assert json.loads((tmp_path/'own.json').read_text())['trusted'] == 'yours'
    whole = (tmp_path/'own.mp4').read_bytes()
    (tmp_path/'-changed.mp4').write_bytes(whole[:-1] + bytes([whole[-1]^1]))
    for args,says in ((['--', '-changed.mp4'], 'marked and altered'), ([store/'plain.mp4'], 'but nothing protects it'), ([store/'source.mp4'], 'no mark')):
        r = command(tmp_path, *args)
        assert (r.returncode, r.stderr) == (1, '') and says in r.stdout
    (tmp_path/'text.mp4').write_text('no video')
    for args,says in ((['none.mp4'], 'does not exist'), (['text.mp4'], 'cannot be read'), ([tmp_path], 'folder'), (['own.mp4', '--trust', 'own.json'], 'holds no certificate'), (['own.mp4', '--trust', 'x'], 'cannot be read')):
        r = command(tmp_path, *args)
        assert (r.returncode, r.stdout, r.stderr.count('\n')) == (2, '', 1) and says in r.stderr

MAKE = '''
import hashlib, sys, time
from pathlib import Path
from lipsync_nb.infer.certificate import local_certificate
import c2pa, cryptography.x509
gate = Path(sys.argv[1])
(gate/sys.argv[2]).touch()
while len(list(gate.iterdir())) < 3: time.sleep(.001)
c = local_certificate()
print(hashlib.sha256(c.chain+c.key).hexdigest())
'''

def test_certificate_made_at_once(tmp_path):
    "Three processes that all find none end up with the same one"
    for i in range(3):
        gate = tmp_path/f'gate{i}'; gate.mkdir()
        env = {**os.environ, 'LIPSYNC_CONFIG':str(tmp_path/f'config{i}')}
        ps = [subprocess.Popen([sys.executable, '-c', MAKE, gate, str(k)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in range(3)]
        outs = [p.communicate() for p in ps]
        assert [p.returncode for p in ps] == [0,0,0], outs
        assert len({o for o,_ in outs}) == 1
        assert sorted(o.name for o in (tmp_path/f'config{i}').iterdir() if o.suffix != '.lock') == ['certificate']

WITHOUT = '''
import json, sys
missing,plain,out,cert = sys.argv[1:]
sys.modules[missing] = None
from lipsync_nb.core import LipSyncError
from lipsync_nb.infer.provenance import check_mark, mark_video
print(json.dumps(mark_video(plain, out)))
for f in (lambda: mark_video(plain, out+'2.mp4', cert=cert), lambda: check_mark(plain)):
    try: f()
    except LipSyncError as e: print(e)
'''

@pytest.mark.parametrize('missing', ['c2pa','cryptography'])
def test_without_the_library(store, tmp_path, missing):
    "The dub is kept, with its comment; who asked for a signature, or for a check, is told"
    r = python(WITHOUT, missing, store/'plain.mp4', tmp_path/'out.mp4', store/'cert.pem')
    assert r.returncode == 0, r.stderr
    rec,sign,check = r.stdout.splitlines()
    assert json.loads(rec)['kind'] == 'comment' and 'not installed' in json.loads(rec)['why']
    assert 'cannot sign with' in sign and 'lipsync_nb[mark]' in sign and 'cannot check' in check
    assert (tmp_path/'out.mp4').read_bytes() == (store/'plain.mp4').read_bytes() and [o.name for o in tmp_path.iterdir()] == ['out.mp4']

class Listener:
    "A server that counts who calls, in the place of every proxy"
    def __enter__(self):
        self.s,self.calls = socket.create_server(('127.0.0.1', 0)),0
        self.url = f'http://127.0.0.1:{self.s.getsockname()[1]}'
        threading.Thread(target=self.serve, daemon=True).start()
        return self
    def serve(self):
        while True:
            try: c,_ = self.s.accept()
            except OSError: return
            self.calls += 1; c.close()
    def __exit__(self, *_): self.s.close()

NO_NET = '''
import socket, sys
def no(*a, **k): raise AssertionError('the network was used')
socket.socket.connect = socket.getaddrinfo = no
from lipsync_nb.infer.provenance import check_mark, mark_video
plain,source,out,remote = sys.argv[1:]
rec = mark_video(plain, out, source)
assert rec['kind'] == 'c2pa' and check_mark(out)['state'] == 'intact'
assert mark_video(plain, out, remote, still=True)['kind'] == 'c2pa'
print(check_mark(remote)['state'])
'''

def test_no_network(store, tmp_path, monkeypatch):
    "Neither signing nor checking calls anybody, not even for a manifest that lies elsewhere"
    from PIL import Image
    with Listener() as net:
        b = io.BytesIO(); Image.new('RGB', (16,16)).save(b, 'JPEG')
        made = c2pa.Builder(provenance._claim('x.jpg'), c2pa_context())
        made.set_no_embed(); made.set_remote_url(f'{net.url}/manifest.c2pa')
        with open(tmp_path/'remote.jpg', 'w+b') as f: made.sign(local_certificate().signer(), 'image/jpeg', b, f)
        proxies = {o: net.url for o in ('HTTP_PROXY','HTTPS_PROXY','ALL_PROXY','http_proxy','https_proxy','all_proxy')}
        r = python(NO_NET, store/'plain.mp4', store/'source.mp4', tmp_path/'out.mp4', tmp_path/'remote.jpg', **proxies)
        assert r.returncode == 0, r.stderr
        assert net.calls == 0 and r.stdout == 'none\n'
        with pytest.raises(c2pa.C2paError): c2pa.Reader(str(tmp_path/'remote.jpg'))      # with its own settings the library does call
        assert net.calls > 0

FULL = '''
import resource, signal, sys
from lipsync_nb.core import LipSyncError
from lipsync_nb.infer.provenance import mark_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,20_000))
try: mark_video(*sys.argv[1:3])
except LipSyncError as e: print(e)
'''

def test_full_disk(store, tmp_path):
    "A file that cannot grow, as on a full disk: one sentence, and nothing is left"
    local_certificate()
    r = python(FULL, store/'plain.mp4', tmp_path/'out.mp4')
    assert r.returncode == 0 and re.match(r'cannot write .*out\.mp4: ', r.stdout) and r.stdout.count('\n') == 1, r.stderr
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('cert', [None,'cert.pem'])
def test_library_fails(store, tmp_path, monkeypatch, cert):
    "An error of the library costs the signature, not the dub; with a certificate of one's own it is an error"
    real = c2pa.Builder.sign
    def sign(self, signer, kind, *args):
        if kind == 'video/mp4': raise c2pa.C2paError('out of order')
        return real(self, signer, kind, *args)                                            # the trial of a certificate
    monkeypatch.setattr(c2pa.Builder, 'sign', sign)
    def run(): return mark_video(store/'plain.mp4', tmp_path/'out.mp4', cert=cert and store/cert)
    if cert:
        with pytest.raises(LipSyncError, match='cannot sign .*plain.mp4 with .*cert.pem: out of order'): run()
        assert not list(tmp_path.iterdir())
    else:
        assert run() == dict(kind='comment', why='out of order')
        assert [o.name for o in tmp_path.iterdir()] == ['out.mp4']

MEASURE = '''
import resource, sys
from lipsync_nb.infer.provenance import check_mark, mark_video
small,large,out = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
mark_video(small, out, small); before = peak()
mark_video(large, out, large); assert check_mark(out)['state'] == 'intact'
print(peak()-before)
'''

def padded(src, dst, size, how='longer'):
    "A copy with `size` bytes more of media, which nothing plays: its box 'longer', with its length in 64 bits ('wide'), or 'another' box"
    b = src.read_bytes(); i = b.rfind(b'mdat')-4; n = len(b)-i
    with open(dst, 'wb') as f:
        if how == 'longer': f.write(b[:i] + (n+size).to_bytes(4, 'big') + b[i+4:])
        if how == 'wide':   f.write(b[:i-8] + (1).to_bytes(4, 'big') + b'mdat' + (n+8+size).to_bytes(8, 'big') + b[i+8:]) # its writer leaves 8 bytes free for that
        if how == 'another': f.write(b + (size+8).to_bytes(4, 'big') + b'mdat')
        f.truncate(f.tell()+size)
    return dst

@pytest.mark.skipif(sys.platform == 'darwin', reason='counts memory in other units')
def test_memory(store, tmp_path):
    "A film of 150 MB takes no more memory than one of 100 kB, give or take"
    r = python(MEASURE, store/'plain.mp4', padded(store/'plain.mp4', tmp_path/'large.mp4', 150<<20), tmp_path/'out.mp4')
    assert r.returncode == 0, r.stderr
    assert int(r.stdout) < 50

@pytest.mark.parametrize('how', ['longer','wide','another'])
def test_any_bit(store, tmp_path, how):
    "No changed bit of picture, sound or headers goes unseen, in a film that is hashed in pieces or in one"
    large = padded(store/'plain.mp4', tmp_path/'large.mp4', 9<<20, how)
    assert len(list(read_frames(large))) == 12
    assert mark_video(large, tmp_path/'out.mp4', store/'source.mp4')['kind'] == 'c2pa'
    assert len(list(read_frames(tmp_path/'out.mp4'))) == 12
    b,rng = bytearray((tmp_path/'out.mp4').read_bytes()),np.random.default_rng(0)
    moov,mdat = b.find(b'moov')-4,b.rfind(b'mdat')-4
    edges = [mdat+k for k in (*range(20), (4<<20)+7, (4<<20)+8, (4<<20)+15, (4<<20)+16)] + [len(b)-k for k in range(1, 20)]
    for i in [*rng.integers(moov, mdat, 40).tolist(), *rng.integers(mdat, len(b), 20).tolist(), *edges]:
        b[i] ^= 1 << (k := int(rng.integers(8))); (tmp_path/'x.mp4').write_bytes(b); b[i] ^= 1 << k
        try: assert check_mark(tmp_path/'x.mp4')['state'] == 'altered', i-mdat
        except LipSyncError: assert i < mdat+16                                           # headers too broken to be a film
    (tmp_path/'x.mp4').write_bytes(b); assert check_mark(tmp_path/'x.mp4')['state'] == 'intact'

def test_in_place_and_names(store, tmp_path):
    d = tmp_path/'zażółć 顔'; d.mkdir()
    shutil.copy(store/'plain.mp4', d/'-f.mp4'); shutil.copy(store/'source.mp4', d/'źródło.MP4')
    mark_video(d/'-f.mp4', d/'-f.mp4', d/'źródło.MP4')
    seen = check_mark(d/'-f.mp4')
    assert seen['state'] == 'intact' and (seen['title'], seen['ingredients'][0]['title']) == ('-f.mp4', 'źródło.MP4')
    assert sorted(o.name for o in d.iterdir()) == ['-f.mp4','źródło.MP4']

@pytest.mark.skipif(not REAL.is_dir(), reason='no real clips: LIPSYNC_REAL_DATA names no folder')
def test_real_clips(tmp_path):
    for src in sorted(REAL.glob('*/*.mp4'))[::9]:
        rec = mark_video(src, tmp_path/'out.mp4', src, model='c0ffee')
        assert rec['kind'] == 'c2pa' and rec['source']['unread'] == '', src
        a,b = probe(src),probe(tmp_path/'out.mp4')
        assert check_mark(tmp_path/'out.mp4')['state'] == 'intact' and (a.n_frames, a.duration, a.width) == (b.n_frames, b.duration, b.width), src
