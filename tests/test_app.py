"The app as people meet it: started as a command, opened in a browser without a window, used, misused, ended"
import base64, itertools, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from lipsync_nb.core import SR, load_json
from lipsync_nb.media import probe, write_audio, write_video
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
        self.ws = connect(page['webSocketDebuggerUrl'], max_size=None)
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
    def close(self): self.ws.close(); self.p.terminate(); self.p.wait(30)

def wait(f, limit, why=lambda: ''):
    end = time.time()+limit
    while time.time() < end:
        if v := f(): return v
        time.sleep(.2)
    raise AssertionError(f'waited {limit} s in vain for {why()}')
