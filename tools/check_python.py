"Say in one sentence why this Python cannot hold the development set, and exit 1; print nothing and exit 0 where it can"
import importlib.util, platform, sys

def trouble():
    "What is wrong with this Python and what to do about it; None where all is well"
    v,here = sys.version_info[:2],(sys.platform, platform.machine())
    if not (3,10) <= v <= (3,12):
        return ('lipsync_nb needs Python 3.10, 3.11 or 3.12 (MediaPipe has no wheel for others) and %s is %d.%d: '
                'install one of them, or name it with `make setup PYTHON=/path/to/python3.11`.' % ((sys.executable,)+v))
    if here not in {('linux', 'x86_64'), ('darwin', 'arm64')}:
        return 'MediaPipe and torch have wheels for Linux x86_64 and macOS arm64, and this is %s %s: use such a machine or container.' % here
    if not (importlib.util.find_spec('venv') and importlib.util.find_spec('ensurepip')):
        return 'Python %d.%d came without its venv module: install it, on Debian and Ubuntu with `apt-get install python%d.%d-venv`.' % (v+v)

if __name__ == '__main__': sys.exit(trouble())
