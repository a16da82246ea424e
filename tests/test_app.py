"The app as people meet it: started as a command, opened in a browser without a window, used, misused, ended"
import base64, itertools, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from lipsync_nb.core import SR, load_json
from lipsync_nb.media import probe, read_frames, save_image, write_audio, write_video
from lipsync_nb.sample import sample_corpus, sample_generator

SCRIPT = Path(sys.executable).parent/'lipsync_app'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason='no Chromium here: the page is not opened')

class Served:
    "The command, running"
    def __init__(self, *args, env={}):
        self.p = subprocess.Popen([SCRIPT, '--no_browser', '--port', '0', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', **env})
        self.said = ''
        while not (m := re.search(r'The page is at (\S+)', self.said)):
            line = self.p.stdout.readline(); assert line, self.said
            self.said += line
        self.url = m[1]
    def get(self, path='/', **kw):
        try:
            with urlopen(Request(self.url+path, **kw), timeout=120) as r: return r.status,r.headers,r.read()
        except HTTPError as e: return e.code,e.headers,e.read()
    def end(self, sig=signal.SIGINT):
        self.p.send_signal(sig); self.said += self.p.communicate(timeout=60)[0]

class Browser:
    "A Chromium without a window, driven over its DevTools protocol"
    def __init__(self, home, *flags):
        from websockets.sync.client import connect
        self.home,self.ids,self.events = Path(home),itertools.count(1),[]
        self.p = subprocess.Popen([CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
            '--autoplay-policy=no-user-gesture-required', '--mute-audio', '--remote-debugging-port=0', f'--user-data-dir={home}', '--window-size=1200,900', *flags, 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = wait(lambda: (self.home/'DevToolsActivePort').exists() and (self.home/'DevToolsActivePort').read_text().split('\n')[0], 60)
        page = wait(lambda: next((o for o in json.loads(urlopen(f'http://127.0.0.1:{port}/json').read()) if o['type'] == 'page'), None), 30)
        self.line = connect(page['webSocketDebuggerUrl'], max_size=None); self.ws = self.line.__enter__()
        for o in ('Page', 'Runtime', 'Log', 'DOM', 'Network'): self(f'{o}.enable')
        self('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(self.home/'got'))

    def __call__(self, method, **params):
        n = next(self.ids); self.ws.send(json.dumps(dict(id=n, method=method, params=params)))
        while True:
            m = json.loads(self.ws.recv(timeout=120))
            if m.get('id') == n:
                assert 'error' not in m, (method, m['error'])
                return m['result']
            self.events.append(m)

    def js(self, code):
        "The value of an expression, awaited"
        r = self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert 'exceptionDetails' not in r, r['exceptionDetails']
        return r['result'].get('value')

    def until(self, code, limit=120): return wait(lambda: self.js(code), limit, lambda: f'{code}\n{self.text()[-1500:]}')
    def text(self): return self.js('document.body.innerText')
    def has(self, text, limit=120): return self.until(f'document.body.innerText.includes({json.dumps(text)})', limit)
    def click(self, text): self.until(f'(() => {{ const b = [...document.querySelectorAll("button, .jupyter-widget-Collapse-header, summary, a")].find(o => o.innerText.trim().startsWith({json.dumps(text)}) && o.offsetParent && !o.disabled); b?.click(); return !!b }})()', 60)
    def open(self, url):
        self('Page.navigate', url=url); self.until('!!document.querySelector(".ls-page .ls-drop") && !!document.querySelector("#rendered_cells").offsetParent')
    def upload(self, slot, path):
        root = self('DOM.getDocument')['root']['nodeId']
        node = self('DOM.querySelector', nodeId=root, selector=f'.ls-drop[data-slot="{slot}"] input')['nodeId']
        self('DOM.setFileInputFiles', nodeId=node, files=[str(path)])
    def type(self, slot, text):
        i = ('video','audio').index(slot)
        self.js(f'(() => {{ const i = document.querySelectorAll(".ls-path input")[{i}]; i.value = {json.dumps(str(text))}; for (const k of ["input","change"]) i.dispatchEvent(new Event(k, {{bubbles: true}})); return 1 }})()')
    def errors(self):
        "What the console complains of"
        self.js('1'); out = []
        for e in self.events:
            p = e.get('params', {})
            if e.get('method') == 'Runtime.exceptionThrown': out.append(str(p['exceptionDetails'].get('exception', p['exceptionDetails']).get('description', p)))
            if e.get('method') == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'): out.append(str([a.get('value', a.get('description')) for a in p['args']]))
            if e.get('method') == 'Log.entryAdded' and p['entry']['level'] == 'error': out.append(f"{p['entry']['text']} {p['entry'].get('url')}")
        return out
    def outside(self, url):
        "Addresses that were asked for elsewhere"
        asked = {e['params']['request']['url'] for e in self.events if e.get('method') == 'Network.requestWillBeSent'}
        return sorted(o for o in asked if not o.startswith((url, 'data:', 'blob:', 'about:')))
    def shot(self, path, width=1200):
        self('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False); time.sleep(.5)
        h = self.js('Math.ceil(Math.max(document.querySelector(".ls-page")?.getBoundingClientRect().bottom + scrollY || 0, 900))')
        self('Emulation.setDeviceMetricsOverride', width=width, height=int(h), deviceScaleFactor=1, mobile=False); time.sleep(.7)
        Path(path).write_bytes(base64.b64decode(self('Page.captureScreenshot', format='png')['data']))
    def close(self): self.line.__exit__(None, None, None); self.p.terminate(); self.p.wait(30)

def wait(f, limit, why=lambda: ''):
    end = time.time()+limit
    while time.time() < end:
        if v := f(): return v
        time.sleep(.2)
    raise AssertionError(f'waited {limit} s in vain for {why()}')

def test_refusals(tmp_path):
    "What cannot be served is said in a sentence, before anything is started"
    import socket
    def run(*args): return subprocess.run([SCRIPT, '--no_browser', *map(str, args)], capture_output=True, text=True, timeout=120)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(1); port = s.getsockname()[1]
        r = run('--port', port)
        assert r.returncode == 2 and r.stderr == f'lipsync_app: cannot listen on 127.0.0.1, port {port} (Address already in use); another program may use it: give another --port\n'
    (tmp_path/'no checkpoint.safetensors').write_text('x'*99)
    r = run('--checkpoint', tmp_path/'none'); assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'does not exist' in r.stderr
    r = run('--checkpoint', tmp_path); assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'holds no checkpoint of a generator' in r.stderr
    r = run('--folder', tmp_path/'no checkpoint.safetensors'/'x'); assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'cannot write' in r.stderr

def test_others_are_let_in_only_when_asked(tmp_path):
    "Another address is announced; nothing stays when the app ends, however it ends"
    s = Served('--ip', '0.0.0.0', env=dict(TMPDIR=str(tmp_path)))
    assert 'Whoever can reach this computer' in s.said
    s.url = s.url.replace('0.0.0.0', '127.0.0.1')
    note, = tmp_path.glob('lipsync_app_*/lipsync.ipynb')
    assert "'paths': False" in load_json(note)['cells'][0]['source']
    assert s.get('/api/kernels/0-0-0-0-0', headers={'Host': 'elsewhere.example'})[0] == 404         # asked for, not refused by the name
    s.end(signal.SIGTERM)
    assert 'Traceback' not in s.said and not list(tmp_path.iterdir())

@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "A clip of five seconds at most, another's voice, a picture, things that will not do"
    d = tmp_path_factory.mktemp('films'); clips = sorted(sample_corpus().glob('p1/*.mp4'), key=lambda p: -probe(p).duration)
    shutil.copy(clips[0], d/'face.mp4'); shutil.copy(sorted(sample_corpus().glob('p2/*.mp4'))[0], d/'voice.mp4')
    save_image(d/'face.png', next(im for _,im in read_frames(clips[0])))
    t = np.arange(60*SR)/SR; write_audio(d/'long.wav', (.2*np.sin(2*np.pi*220*t)*np.sin(4*np.pi*t).clip(0)).astype(np.float32))
    (d/'<img src=x onerror=alert(1)>.mp4').write_text('no film at all '*99); (d/'empty.wav').touch()
    write_video(d/'mute.mp4', [np.full((96,96,3), 99, np.uint8)]*5)
    return d

@pytest.fixture(scope='module')
def served(tmp_path_factory):
    d = tmp_path_factory.mktemp('served')
    s = Served('--checkpoint', sample_generator(), '--folder', d/'kept'); s.kept = d/'kept'
    yield s
    if s.p.poll() is None: s.end()

@pytest.fixture(scope='module')
def page(served, tmp_path_factory):
    "The page, open"
    b = Browser(tmp_path_factory.mktemp('browser'), '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream')
    b.open(served.url); b.shots = Path(os.environ['LIPSYNC_SHOTS']) if os.environ.get('LIPSYNC_SHOTS') else None
    yield b
    b.close()

def shot(page, name, **kw):
    if page.shots: page.shots.mkdir(exist_ok=True); page.shot(page.shots/f'{name}.png', **kw)

@needs_browser
def test_upload_dub_play_download(served, page, films):
    shot(page, 'open')
    page.upload('video', films/'face.mp4'); page.has('Who shall speak')
    page.upload('audio', films/'voice.mp4'); page.has('voice.mp4 · ')
    begin = time.time(); page.click('Dub'); page.has('face-dubbed.mp4 is ready.'); took = time.time()-begin
    print(f'{probe(films/"face.mp4").duration:.1f} s of film: {took:.1f} s from the click to the result')
    assert took < 60
    page.until('[...document.querySelectorAll(".ls-pair video")].filter(v => v.readyState > 1 && v.videoWidth).length == 2')
    x = page.js('''(async () => { const [s,r] = document.querySelectorAll(".ls-pair video"), rest = t => new Promise(o => setTimeout(o, t)), now = () => [s.paused, r.paused, s.currentTime, r.currentTime], out = [s.muted, r.muted];
        await r.play(); await rest(1500); out.push(now()); s.pause(); await rest(300); out.push(now()); r.currentTime = .5; await rest(500); out.push(now()); return out })()''')
    muted,heard,playing,stopped,moved = x
    assert muted and not heard and playing[:2] == [False,False] and stopped[:2] == [True,True] and min(playing[2:]) > .3, x
    assert abs(playing[2]-playing[3]) < .3 and abs(moved[2]-.5) < .05, x                                       # in step
    for text,end in (('Download the film', '.mp4'), ('Report', '.json')):
        page.click(text); got = wait(lambda: next((p for p in (page.home/'got').glob(f'face-dubbed{end}') if p.stat().st_size), None), 30)
        assert got.read_bytes() == next(served.kept.glob(f'*/{got.name}')).read_bytes()
    rep = load_json(page.home/'got'/'face-dubbed.json'); assert rep['dubbed'] == rep['frames'] == probe(page.home/'got'/'face-dubbed.mp4').n_frames
    assert 'marked and intact' in page.text() or 'not signed' in page.text()
    shot(page, 'result'); shot(page, 'narrow', width=420)
    assert not page.errors() and not page.outside(served.url)

@needs_browser
def test_what_goes_wrong_is_said(page, films):
    bad = next(films.glob('<img*')); page.js('window.alert = () => window.hacked = 1')
    page.upload('video', bad); page.has('cannot be read as video or sound'); assert f'{bad.name} cannot' in page.text() and not page.js('window.hacked'); shot(page, 'unreadable')
    page.click('Dub'); page.has('Choose a film or a picture first.')
    page.upload('video', films/'mute.mp4'); page.has('shows no face that can be dubbed')
    page.upload('audio', films/'empty.wav'); page.has('empty.wav is empty; choose another file.')
    page.upload('audio', films/'mute.mp4'); page.has('mute.mp4 has no sound')
    page.type('audio', films/'none.wav'); page.has('none.wav does not exist; check the path')
    page.upload('video', films/'face.png'); page.has('face.png · '); page.has('Who shall speak'); page.click('Dub'); page.has('Choose a sound first.')
    page.type('audio', films/'voice.mp4'); page.has('voice.mp4 · ')
    page.js('(() => { const z = document.querySelector(".ls-drop[data-slot=audio]"); z.dataset.to = z.dataset.to.replace("127.0.0.1", "").replace("/app/put", "http://127.0.0.1:9/put") })()')
    page.upload('audio', films/'voice.mp4'); page.has('The upload of voice.mp4 broke off'); shot(page, 'broken off')
    page.js('(() => { const z = document.querySelector(".ls-drop[data-slot=audio]"); z.dataset.to = document.querySelector(".ls-drop[data-slot=video]").dataset.to })()')
    assert all('127.0.0.1:9' in o for o in page.errors()), page.errors()                                           # only the address that was broken on purpose
    page.events.clear()

@needs_browser
def test_cancel(served, page, films):
    page.upload('video', films/'face.png'); page.has('face.png · '); page.has('Who shall speak')
    page.upload('audio', films/'long.wav'); page.has('long.wav · ')
    page.click('Dub'); page.until(r'/dubbing · [1-9]\d*% · about \d+ s left/.test(document.body.innerText)'); shot(page, 'dubbing')
    page.click('Cancel'); page.has('Cancelled; nothing was written.')
    assert not [p for p in served.kept.rglob('*') if 'face-dubbed-2' in p.name or '.parts' in p.name or '.tmp' in p.name]
    assert not page.errors()

@needs_browser
def test_record(page, films):
    page.upload('video', films/'face.mp4'); page.has('face.mp4 · ')
    page.click('● Record'); page.has('■ Stop · 2 s'); page.click('■ Stop'); page.has('recording-'); page.has('Who shall speak')
    page.click('Dub'); page.has('face-dubbed-2.mp4 is ready.'); assert not page.errors()

@needs_browser
def test_large_film(served, page, films):
    "80 MB, which a widget's message would lose, arrive, are dubbed, and play"
    body = (films/'face.mp4').read_bytes(); n = 80_000_000-len(body)
    with open(films/'large film.mp4', 'wb') as f: f.write(body + n.to_bytes(4, 'big') + b'free'); f.truncate(80_000_000)
    begin = time.time(); page.upload('video', films/'large film.mp4'); page.has('large film.mp4 · 80 MB'); print(f'80 MB uploaded and looked at in {time.time()-begin:.1f} s')
    page.has('Who shall speak'); page.click('Dub'); page.has('large film-dubbed.mp4 is ready.')
    page.until('[...document.querySelectorAll(".ls-pair video")].filter(v => v.videoWidth).length == 2'); assert not page.errors()

@needs_browser
def test_page_that_is_left_or_dies(served, page):
    "A page that is closed takes its uploads with it, and not its results; a page whose process dies says so"
    import psutil
    kernel = lambda: [p for p in psutil.Process(served.p.pid).children(recursive=True) if 'ipykernel_launcher' in ' '.join(p.cmdline())]
    old, = kernel(); page('Page.navigate', url='about:blank'); wait(lambda: not old.is_running() or old.status() == 'zombie', 60)
    wait(lambda: not list(served.kept.glob('*/up')), 30); assert list(served.kept.glob('*/large film-dubbed.mp4'))
    page.open(served.url); new = wait(lambda: next((p for p in kernel() if p.pid != old.pid), None), 30)
    new.kill(); page.has('The program behind this page has ended', 60); shot(page, 'died')
    served.end(); assert served.p.returncode == 0 and 'Traceback' not in served.said
