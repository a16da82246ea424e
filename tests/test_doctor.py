"What presets ask of their data, as `lipsync_doctor` says, and as they are; its exit codes"
import subprocess, sys
import pytest
from lipsync_nb.data.rules import NEEDS
from lipsync_nb.models.generator import Generator
from lipsync_nb.models.syncnet import SyncNet
from lipsync_nb.train.learner import RUNS

def test_every_preset_has_its_needs(): assert set(NEEDS) == set(RUNS)

@pytest.mark.parametrize('preset', NEEDS)
def test_needs_are_those_of_the_preset(preset):
    o,run = NEEDS[preset],RUNS[preset]
    longest = max((s for s in run.stages if s.name != 'listen'), key=lambda s: s.t)
    assert (o.t, o.bs, o.ctx, o.refs) == (longest.t, longest.bs, run.ctx, run.refs)
    assert o.t == SyncNet.presets[preset].t and o.size == Generator.presets[preset].size

def test_a_folder_that_is_none_ends_with_2(root, tmp_path):
    r = subprocess.run([sys.executable, '-m', 'lipsync_nb.data.doctor', str(tmp_path/'nowhere')], cwd=root, capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.startswith('lipsync_doctor: ') and 'is no folder' in r.stderr and 'Traceback' not in r.stderr
