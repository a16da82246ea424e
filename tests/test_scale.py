"Items over a real dask scheduler and two workers: nothing is lost when one is killed, and nobody goes on when the driver is gone"
import json, os, signal, subprocess, sys, time
from pathlib import Path
from threading import Thread, Timer
import pytest
distributed,psutil = pytest.importorskip('distributed'),pytest.importorskip('psutil')
from lipsync_nb.core import LipSyncError
from lipsync_nb.scale import dask_map

TASKS = '''
import os, signal, time
from pathlib import Path
from lipsync_nb.core import atomic_path

def note(path):
    "One more line in `path`: this process and the dask worker above it; how many there are now"
    with open(path, 'a') as f: f.write(f'{os.getpid()} {os.getppid()}\\n')
    return len(path.read_text().splitlines())

def work(i, what, folder):
    folder = Path(folder)
    first = note(folder/f'{i}.begun') == 1
    with atomic_path(folder/f'{i}.txt') as tmp:
        tmp.write_text('half')
        if what == 'die': os.kill(os.getpid(), signal.SIGKILL)
        if what == 'kill worker': os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
        if what == 'raise': raise ValueError(f'bad video {i}')
        if what == 'hang' or what == 'hang once' and first: time.sleep(60)
        time.sleep(.05)
        tmp.write_text(f'{i} is done')
    note(folder/f'{i}.done')
    return i*i
'''

DRIVER = '''
import sys
from lipsync_nb.scale import dask_map
if __name__ == '__main__':
    items = [(i, 'hang' if i else '', sys.argv[2]) for i in range(9)]
    for i,res in dask_map('tasks_of_test:work', items, sys.argv[1]): print(i, res, flush=True)
'''

def until(happens, seconds=60):
    end = time.monotonic()+seconds
    while not (res := happens()):
        assert time.monotonic() < end, 'it never happened'
        time.sleep(.05)
    return res

def notes(path): return [tuple(map(int, l.split())) for l in path.read_text().splitlines()] if path.exists() else []

def env(folder, **kw): return {**os.environ, 'PYTHONPATH': str(folder), 'LIPSYNC_QUIET': '1', **kw}

def start_dask(folder, *args, **kw):
    log = open(folder/'dask.log', 'a')
    return subprocess.Popen([Path(sys.executable).with_name('dask'), *args], cwd=folder, env=env(folder, **kw), stdout=log, stderr=log)

def start_scheduler(folder):
    "A scheduler that suspects a task twice before it gives it up (four times takes long), and its address"
    p = start_dask(folder, 'scheduler', '--host', '127.0.0.1', '--port', '0', '--dashboard-address', '127.0.0.1:0', '--scheduler-file', 'at.json', DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES='1')
    def address():
        try: return json.loads((folder/'at.json').read_text())['address']
        except (OSError, ValueError): assert p.poll() is None, (folder/'dask.log').read_text()
    return p,until(address)

def start_worker(folder, address, *args, **kw):
    return start_dask(folder, 'worker', address, '--host', '127.0.0.1', '--nthreads', '1', '--no-dashboard', *args, **kw)

def workers(nannies): return [p for n in nannies for p in psutil.Process(n.pid).children() if 'spawn_main' in ' '.join(p.cmdline())]

def both(nannies):
    "The two dask workers, once a killed one was replaced"
    until(lambda: len(workers(nannies)) == 2)
    return workers(nannies)

def stop(*procs):
    for p in procs: p.terminate()
    for p in procs:
        try: p.wait(15)
        except subprocess.TimeoutExpired: p.kill(); p.wait()

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "Address of a scheduler with two workers, one of which has a GPU, or says so; and the nannies of the workers"
    d = tmp_path_factory.mktemp('cluster')
    (d/'tasks_of_test.py').write_text(TASKS)
    scheduler,address = start_scheduler(d)
    nannies = [start_worker(d, address), start_worker(d, address, '--resources', 'GPU=1')]
    yield address,nannies
    stop(*nannies); stop(scheduler)

def run(address, items, **kw): return dict(dask_map('tasks_of_test:work', items, address, **kw))

def test_killed_workers_lose_nothing(cluster, tmp_path):
    "A dask worker and, later, the process that does an item are killed, each in the midst of an item"
    killed = []
    def kill(i, which):
        pid = until(lambda: notes(tmp_path/f'{i}.begun'))[0][which]
        killed.append(pid); os.kill(pid, signal.SIGKILL)
    killers = [Thread(target=kill, args=o) for o in ((8,1), (24,0))]
    for t in killers: t.start()
    res = run(cluster[0], [(i, 'hang once' if i in (8,24) else '', str(tmp_path)) for i in range(40)], limit=50)
    for t in killers: t.join()
    assert res == {i: i*i for i in range(40)}
    assert [(tmp_path/f'{i}.txt').read_text() for i in range(40)] == [f'{i} is done' for i in range(40)]
    begun,done = ([notes(tmp_path/f'{i}.{o}') for i in range(40)] for o in ('begun', 'done'))
    assert len(begun[8]) == 2 and len(begun[24]) >= 2
    assert begun[8][0] not in done[8] and begun[24][0] not in done[24], 'a killed item went on'
    assert not list(tmp_path.glob('.8.*')), 'the child of the killed worker left something half-written'
    for i in set(range(40))-{8,24}: # only what a dead worker had not yet handed over is done again
        assert len(done[i]) == len(begun[i]) and all(ppid in killed for _,ppid in begun[i][:-1])

def test_results_that_went_with_their_worker_are_made_again(cluster, tmp_path):
    before,g = both(cluster[1]),dask_map('tasks_of_test:work', [(i, '', str(tmp_path)) for i in range(12)], cluster[0])
    res = [next(g)]                                                  # and now the driver is busy with something else
    until(lambda: all((tmp_path/f'{i}.done').exists() for i in range(12)))
    for w in before: w.kill()
    time.sleep(.3)
    assert dict(res+list(g)) == {i: i*i for i in range(12)}
    assert all((tmp_path/f'{i}.txt').read_text() == f'{i} is done' for i in range(12)) and not list(tmp_path.glob('.*'))

def test_bad_items_cost_themselves_alone(cluster, tmp_path):
    bad = {3:'die', 9:'raise', 14:'hang', 20:'kill worker'}
    res = run(cluster[0], [(i, bad.get(i, ''), str(tmp_path)) for i in range(30)], limit=lambda o: 1 if o[1] == 'hang' else 60)
    assert sorted(res) == list(range(30))
    assert {i: (res[i].kind, str(res[i])) for i in bad} == {
        3: ('died', 'its worker process died (exit code -9)'), 9: ('raised', 'ValueError: bad video 9'),
        14: ('late', 'it took too long'), 20: ('died', 'the dask workers that ran it died')}
    assert all(res[i] == i*i and (tmp_path/f'{i}.txt').read_text() == f'{i} is done' for i in range(30) if i not in bad)
    assert not any((tmp_path/f'{i}.txt').exists() for i in bad)

def test_late_items_and_crashes_leave_the_workers_alone(cluster, tmp_path):
    before = both(cluster[1])
    res = run(cluster[0], [(i, o, str(tmp_path)) for i,o in enumerate(['hang', 'die', 'hang', ''])], limit=.5)
    assert [res[i].kind for i in range(3)] == ['late', 'died', 'late'] and res[3] == 9
    assert [len(notes(tmp_path/f'{i}.begun')) for i in range(4)] == [1,2,1,1], 'late items are not tried again, crashed ones once'
    assert workers(cluster[1]) == before

def test_resources(cluster, tmp_path):
    assert run(cluster[0], [(i, '', str(tmp_path)) for i in range(8)], resources={'GPU': 1}) == {i: i*i for i in range(8)}
    gpu, = workers(cluster[1][1:])
    assert {notes(tmp_path/f'{i}.done')[0][1] for i in range(8)} == {gpu.pid}

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_when_the_driver_is_gone_the_workers_are_idle(cluster, tmp_path, how):
    script = tmp_path/'driver.py'; script.write_text(DRIVER)
    before = both(cluster[1])
    p = subprocess.Popen([sys.executable, script, cluster[0], tmp_path], env=env(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == '0 0\n'
    until(lambda: sum((tmp_path/f'{i}.begun').exists() for i in range(9)) == 3)
    p.send_signal(how)
    _,err = p.communicate(timeout=60)
    assert p.returncode == -how and 'distributed' not in err and ('KeyboardInterrupt' in err) == (how == signal.SIGINT)
    until(lambda: not any(w.children() for w in before))             # what they were at is stopped, and nothing new begins
    assert workers(cluster[1]) == before
    assert sum((tmp_path/f'{i}.begun').exists() for i in range(9)) == 3 and not list(tmp_path.glob('.*'))
    assert run(cluster[0], [(50, '', str(tmp_path))]) == {0: 2500}

def test_ctrl_c_ends_a_cluster_of_our_own(tmp_path):
    "A terminal sends it to the workers too"
    script = tmp_path/'driver.py'; script.write_text(DRIVER)
    (tmp_path/'tasks_of_test.py').write_text(TASKS)
    p = subprocess.Popen([sys.executable, script, 'local', tmp_path], env=env(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert p.stdout.readline() == '0 0\n'
    until(lambda: sum((tmp_path/f'{i}.begun').exists() for i in range(9)) == 3)
    group = [o for o in psutil.process_iter() if os.getpgid(o.pid) == p.pid]
    assert len(group) >= 5                                           # the driver, two workers, two children
    os.killpg(p.pid, signal.SIGINT)
    _,err = p.communicate(timeout=60)
    assert p.returncode == -signal.SIGINT and err.count('Traceback') == 1 and 'distributed' not in err, err
    until(lambda: not any(o.is_running() for o in group))

def test_a_worker_without_the_package_and_a_scheduler_that_goes(tmp_path, capsys):
    other = tmp_path/'other'/'lipsync_nb'
    other.mkdir(parents=True); (other/'__init__.py').write_text('raise ImportError("not on this machine")')
    scheduler,address = start_scheduler(tmp_path)
    worker = start_worker(tmp_path, address, PYTHONPATH=str(other.parent))
    try:
        with pytest.raises(LipSyncError, match='cannot do the work .*not on this machine'): run(address, [(0, '', str(tmp_path))])
        stop(worker); capsys.readouterr()                                   # a worker that takes long to come is waited for in words, too
        Timer(5, scheduler.kill).start()
        with pytest.raises(LipSyncError, match='lost the dask scheduler'): run(address, [(0, '', str(tmp_path))])
        assert capsys.readouterr().err.count('waiting for a dask worker') == 1
    finally: stop(worker, scheduler)
