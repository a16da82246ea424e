"""Rewrite constraints.txt, the complete set of pins that `make setup` installs, from settings.ini.

Needs uv (`pip install uv`) and a network: `python tools/lock.py [--upgrade]`. Pins that still fit are kept unless --upgrade
is given. Any option of `uv pip compile` may be added, say `--upgrade-package wandb`."""
import re, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
lock = root/'constraints.txt'
platforms = [('linux', 'x86_64'), ('darwin', 'arm64')]        # where MediaPipe and torch both have wheels
added = ['opencv-contrib-python-headless==4.11.0.86']         # the same cv2 as MediaPipe's, without its need of libGL
left_out = {                                                  # named in some package's metadata, imported by nothing here
    'opencv-contrib-python': 'shares the folder cv2 with the headless build: never both',
    'jax': 'mediapipe', 'jaxlib': 'mediapipe', 'sentencepiece': 'mediapipe', 'sounddevice': 'mediapipe',
    'torchvision': 'fastai', 'spacy': 'fastai', 'wheel': 'astunparse', 'triton': 'torch'}
from_torch = re.compile('(nvidia|cuda|triton)')               # torch pins its own CUDA libraries, where its build has any
header = '''# The development set, pinned: what `make setup` and CI install on Python 3.10, 3.11 and 3.12 (Linux x86_64, macOS arm64).
# torch and what it needs come first, by these pins; then all the rest with `--no-deps`, for the set is complete as it stands.
# Written by tools/lock.py from settings.ini. Left out, since nothing imports them: {}.
'''

def env_marker(sys_platform, machine): return f"(platform_machine == '{machine}' and sys_platform == '{sys_platform}')"

def requirements():
    "All that a developer needs, as settings.ini names it"
    cfg = ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini', encoding='utf-8')
    return ' '.join(cfg['DEFAULT'][k] for k in ('requirements', 'dev_requirements')).split() + added

def simplify(line):
    "Drop from a pin's marker what holds in every supported environment"
    pin,_,marker = line.partition(' ; ')
    everywhere = '(' + ' or '.join(sorted(env_marker(*p) for p in platforms)) + ')'
    for s in (everywhere, "python_full_version < '3.13'", "implementation_name != 'PyPy'"): marker = marker.replace(s, '')
    for p,m in platforms: marker = marker.replace(f"platform_machine == '{m}' and sys_platform == '{p}'", f"sys_platform == '{p}'")
    marker = ' and '.join(o for o in marker.split(' and ') if o.strip())
    return f'{pin} ; {marker}' if marker else pin

def compile_pins(options):
    "The pins that uv finds for all supported Pythons and platforms at once"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        envs = [f"sys_platform == '{p}' and platform_machine == '{m}' and python_version < '3.13'" for p,m in platforms]
        (d/'pyproject.toml').write_text(f'[project]\nname = "dev"\nversion = "0"\nrequires-python = ">=3.10,<3.13"\n[tool.uv]\nenvironments = {envs}\n')
        (d/'dev.in').write_text('\n'.join(requirements()))
        (d/'over.txt').write_text('\n'.join(f"{o} ; sys_platform == 'never'" for o in left_out))
        (d/'out.txt').write_text(lock.read_text() if lock.exists() else '')
        subprocess.run(['uv', 'pip', 'compile', '--quiet', '--universal', '--python-version', '3.10', '--override', 'over.txt', 'dev.in',
            '--output-file', 'out.txt', '--no-header', '--no-annotate', *options], cwd=d, check=True, stdout=subprocess.DEVNULL)
        return (d/'out.txt').read_text().splitlines()

if __name__ == '__main__':
    pins = [simplify(o) for o in compile_pins(sys.argv[1:]) if '==' in o and not from_torch.match(o)]
    lock.write_text(header.format(', '.join(left_out)) + '\n'.join(pins) + '\n')
    print(f'{lock.name}: {len(pins)} pins')
