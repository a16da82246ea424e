"The monitor on many made-up runs: silence on healthy ones, however they are logged, and a name for every fault"
import json, math
import numpy as np
import pytest
from lipsync_nb.train.monitor import Monitor, MonitorCfg

STEPS = dict(coarse=200, sync=200, full=300)

def noise(rng, n, sigma, memory, tail):
    e,x = rng.standard_t(tail, n)*(1-2/tail)**.5,np.zeros(n)
    for i in range(n): x[i] = memory*x[i-1] + (1-memory**2)**.5*e[i]
    return np.exp(sigma*x)

def healthy(seed, every=1, valid=40):
    "Falling losses with heavy-tailed noise that remembers, and a critic whose scores wander"
    rng,rows,step,level = np.random.default_rng(seed),[],0,dict(shape=.07, l1=.12, ssim=.4, sync=.5)
    sigma,memory,tail = rng.uniform(.02,.3),rng.choice([0,.3,.6]),rng.choice([3,5,30])
    for stage,n in STEPS.items():
        t,s = np.arange(n),{}
        for k in level:
            end = level[k]*rng.uniform(.3,.9)
            s[k] = (end + (level[k]-end)*np.exp(-t/rng.uniform(20,100)))*noise(rng, n, sigma, memory, tail); level[k] = end
        if stage=='full':
            G = rng.choice([.1,1,8,-.5]); awake = 1-np.exp(-t/rng.uniform(5,30))
            gap = awake*(G*np.exp(-t/rng.uniform(200,2000)) + .1*abs(G)*rng.normal(size=n)); drift = np.cumsum(rng.normal(0, .03*abs(G)+.01, n))
            s |= dict(critic_norm=.004+awake*noise(rng, n, .1, .3, 9), critic_gap=gap, critic_real=drift+gap/2, critic_fake=drift-gap/2, adv=gap/2-drift)
        for i in range(n):
            step += 1
            if step%every==0: rows.append((step, stage, {k:float(v[max(0,i-every+1):i+1].mean()) for k,v in s.items()}))
            if (i+1)%valid==0: rows.append((step, stage, {f'valid_{k}':float(1.1*s[k][max(0,i-20):i+1].mean()) for k in level} | dict(valid_leak_silent=abs(rng.normal(.05,.03)))))
    return rows

def first_fault(rows, monitor=None):
    m = monitor or Monitor()
    return next(((step,v) for step,stage,f in rows if (v := m.update(step, stage, f)).fault), None)

@pytest.mark.parametrize('every', [1,4,10])
def test_no_false_alarm(every):
    alarms = {seed:found[1].sentence for seed in range(100, 124) if (found := first_fault(healthy(seed, every)))}
    assert not alarms, alarms

@pytest.mark.parametrize('every', [1,4])
def test_every_fault_within_twenty_steps(every):
    def grow(f, d): return {k:v*min(1.5**d, 50) if k in ('l1','ssim','shape','sync') else v for k,v in f.items()}
    faults = {'nan':lambda f,d: f | dict(l1=math.nan), 'diverged':grow, 'critic dead':lambda f,d: f | dict(critic_norm=.01, critic_gap=1e-4), 'critic dominates':lambda f,d: f | dict(critic_norm=50.)}
    for kind,how in faults.items():
        for seed in range(200, 206):
            at = 540+8*(seed-200)
            step,v = first_fault([(s, st, how(f, s-at+1) if s>=at and 'l1' in f else f) for s,st,f in healthy(seed, every)])
            assert (v.kind, v.action)==(kind,'rollback') and 0<=step-at<20 and v.good<at-1, (kind, seed, at, step, v)

def test_rollback_goes_on_and_gives_up():
    "A rate that is too high blows the loss up until it has been halved twice; one that is never right ends the run"
    def drive(right, most=3):
        m,step,ends,rng = Monitor(MonitorCfg(most=most)),0,[],np.random.default_rng(0)
        while step<400:
            step += 1; bad = step>200 and m.scale>right
            v = m.update(step, 'coarse', dict(loss=.1*rng.normal(1,.05)*(min(1.6**(step-200), 1e4) if bad else 1)))
            if v.fault: ends.append(v.action)
            if v.action=='stop': return m,ends,v.sentence
            if v.fault: assert v.good<=200; step = v.good//20*20; m.rolled_back(step)
        return m,ends,''
    m,ends,_ = drive(.25); assert (m.scale, ends)==(.25, ['rollback']*2)
    m,ends,said = drive(0, most=2); assert ends==['rollback']*2+['stop'] and '2 rollbacks of stage coarse did not help' in said

def test_state_goes_through_json_at_any_step():
    rows = healthy(7)
    a,b = Monitor(MonitorCfg(patience=3)),Monitor(MonitorCfg(patience=3))
    for i,(s,st,f) in enumerate(rows):
        if i%101==0: state = json.loads(json.dumps(b.state_dict())); b = Monitor(MonitorCfg(patience=3)); b.load_state_dict(state)
        assert a.update(s, st, f)==b.update(s, st, f)
    assert a.state_dict()==b.state_dict()
    assert max(len(v) for k,v in a.series.items() if not k.startswith('valid_'))<=4*MonitorCfg().window+1     # memory does not grow with the run
