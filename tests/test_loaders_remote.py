"A collection behind a real server: batches over FTP are those of the files, and only what they need is fetched"
import ftplib, os, socket, socketserver, threading
from pathlib import Path
import pytest
import torch
from test_loaders import prepared, same          # noqa: F401 (a fixture)

from lipsync_nb.core import LipSyncError
from lipsync_nb.data.batches import GenBatches, StepLoader
from lipsync_nb.data.loaders import ClipStore

class Ftp(socketserver.StreamRequestHandler):
    "As much of RFC 959 and 3659 as a client needs that lists folders and reads pieces of files"
    def say(self, line): self.wfile.write(f'{line}\r\n'.encode()); self.wfile.flush()
    def path(self, arg): return self.server.root/arg.strip('/')

    def handle(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)      # a client breaks off with an urgent byte
        self.say('220 ready'); at = 0
        with socketserver.TCPServer(('127.0.0.1', 0), None) as data:
            while line := self.rfile.readline().decode().strip():
                cmd,_,arg = line.partition(' '); cmd = cmd.upper()
                if cmd == 'QUIT': return self.say('221 bye')
                elif cmd == 'USER': self.say('331 password?')
                elif cmd in ('PASS','TYPE','OPTS'): self.say('230 fine' if cmd == 'PASS' else '200 fine')
                elif cmd == 'ABOR': self.say('226 broken off')
                elif cmd == 'EPSV': self.say(f'229 here (|||{data.server_address[1]}|)')
                elif cmd == 'PASV': h,l = divmod(data.server_address[1], 256); self.say(f'227 here (127,0,0,1,{h},{l})')
                elif cmd == 'REST': at = int(arg); self.say('350 from there')
                elif cmd == 'SIZE': self.say(f'213 {self.path(arg).stat().st_size}' if self.path(arg).is_file() else '550 none')
                elif cmd == 'MLSD' and self.path(arg).is_dir():
                    self.send(data, ''.join(f'type={"dir" if p.is_dir() else "file"};size={p.stat().st_size}; {p.name}\r\n' for p in sorted(self.path(arg).iterdir())).encode())
                elif cmd == 'RETR' and self.path(arg).is_file(): self.send(data, self.path(arg).read_bytes()[at:], arg); at = 0
                else: self.say('550 no')

    def send(self, data, b, name=None):
        self.say('150 coming'); s,_ = data.get_request()
        n = 0
        try:
            for i in range(0, len(b), 4096): s.sendall(b[i:i+4096]); n += len(b[i:i+4096])
        except OSError: pass                     # the client has enough
        finally: s.close()
        if name: self.server.sent.append((name, n))
        self.say('226 done')

@pytest.fixture
def server(prepared):
    class Server(socketserver.ThreadingTCPServer): daemon_threads,allow_reuse_address = True,True
    with Server(('127.0.0.1', 0), Ftp) as s:
        s.root,s.sent = Path(prepared).parent,[]
        threading.Thread(target=s.serve_forever, daemon=True).start()
        s.url = f'ftp://ann:secret@127.0.0.1:{s.server_address[1]}/{Path(prepared).name}'
        yield s
        s.shutdown()

def test_the_server(server, prepared):
    "The server itself, asked by Python's own client"
    with ftplib.FTP() as c:
        c.connect(*server.server_address); c.login()
        got = []; c.retrbinary(f'RETR {prepared.name}/index.parquet', got.append, rest=5)
        assert b''.join(got) == (prepared/'index.parquet').read_bytes()[5:]
        assert [n for n,_ in c.mlsd(f'{prepared.name}/ann')] == sorted(os.listdir(prepared/'ann'))

@pytest.mark.parametrize('workers', [0, 2])
def test_batches_over_ftp(server, prepared, workers):
    near,far = (GenBatches(ClipStore(at, cache=False), t=5, bs=3, refs=2) for at in (prepared, server.url))
    same(StepLoader(near, 3), StepLoader(far, 3, workers=workers))

def test_cache_over_ftp(server, prepared):
    torch.testing.assert_close(ClipStore(server.url, cache=True).px, ClipStore(prepared, cache=True).px, rtol=0, atol=0)

def test_only_pieces_are_fetched(server, prepared):
    far = ClipStore(server.url, cache=False)
    far.frames(far.first[:1,None]); server.sent.clear()
    far.frames(far.first[:1,None] + [[3,4,5]])
    whole = (prepared/far[0].person/far[0].name/'crops.avi').stat().st_size
    assert server.sent and all(n.endswith('crops.avi') for n,_ in server.sent) and sum(b for _,b in server.sent) < whole

def test_no_such_place(server):
    with pytest.raises(LipSyncError, match='has no index'): ClipStore(server.url + '/nothing')
