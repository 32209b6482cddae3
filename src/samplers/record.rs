//! A sampler as data: run over a recording latent, it leaves a table with one row per model evaluation.
//!
//! A row says, over a few state slots, all of the shape of the latent and in float32:
//!
//! ```text
//! prepare:  the network's input = scale_in * slots[x_slot], at timestep
//! advance:  m = guided raw output;  X = slots[x_slot]
//!           d = dx * X + dm * m;  if clip > 0: d = clamp(d, -clip, clip)
//!           next = sum of c[s] * slots[s] + cm * m + cd * d + cz * noise[noise]
//!           slots[keep_m] = m;  slots[keep_d] = d;  slots[next_slot] = next     (index -1: not kept)
//! ```
//!
//! A slot whose weight is zero is not read: it may hold anything. No row writes a slot that it reads, so a
//! row can be run again.

use super::schedule::{Conversion, Ladder, Point};
use super::{Latent, Model, Prediction};
use crate::error::{Error, Result};
use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

/// State slots that a row can address.
pub const MAX_SLOTS: usize = 8;

/// One row in f32; `diffusion` packs it into the table that the device reads.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Row {
    /// Where the network is evaluated.
    pub timestep: f32,
    /// Factor between the state and the network's input.
    pub scale_in: f32,
    /// Weight of the state in the denoised latent d.
    pub dx: f32,
    /// Weight of the raw output m in d.
    pub dm: f32,
    /// Bound of d; 0: unbounded.
    pub clip: f32,
    /// Weight of m in the next state.
    pub cm: f32,
    /// Weight of d in the next state.
    pub cd: f32,
    /// Weight of fresh noise in the next state.
    pub cz: f32,
    /// Weights of the slots in the next state.
    pub c: [f32; MAX_SLOTS],
    /// Slot of the state that is evaluated.
    pub x_slot: i32,
    /// Slot that the next state goes to.
    pub next_slot: i32,
    /// Slot that m goes to, or -1.
    pub keep_m: i32,
    /// Slot that d goes to, or -1.
    pub keep_d: i32,
    /// Index of the fresh noise, or -1.
    pub noise: i32,
}

/// One row in f64: what [`Row`] is rounded from. Same fields, same meaning.
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs)]
pub struct Exact {
    pub timestep: f64,
    pub scale_in: f64,
    pub dx: f64,
    pub dm: f64,
    pub clip: f64,
    pub cm: f64,
    pub cd: f64,
    pub cz: f64,
    pub c: [f64; MAX_SLOTS],
    pub x_slot: usize,
    pub next_slot: usize,
    pub keep_m: Option<usize>,
    pub keep_d: Option<usize>,
    pub noise: Option<usize>,
}

/// A sampler's whole way as rows, ready for a device.
#[derive(Clone, PartialEq, Debug)]
pub struct Table {
    /// One per evaluation, in order.
    pub rows: Vec<Row>,
    /// The same rows before rounding.
    pub exact: Vec<Exact>,
    /// Slots in use, at most [`MAX_SLOTS`].
    pub slots: usize,
    /// Fresh noises that the rows read, drawn in the order of their index.
    pub noises: usize,
    /// Standard deviation of a state that is pure noise: `slots[first_slot] = noise_scale * unit noise`.
    pub noise_scale: f64,
    /// Slot of the state before the first row.
    pub first_slot: usize,
    /// Slot of the latent after the last row.
    pub last_slot: usize,
}

impl Exact {
    /// Rounded for the device.
    pub fn pack(&self) -> Row {
        let index = |slot: Option<usize>| slot.map_or(-1, |s| s as i32);
        Row {
            timestep: self.timestep as f32,
            scale_in: self.scale_in as f32,
            dx: self.dx as f32,
            dm: self.dm as f32,
            clip: self.clip as f32,
            cm: self.cm as f32,
            cd: self.cd as f32,
            cz: self.cz as f32,
            c: self.c.map(|c| c as f32),
            x_slot: self.x_slot as i32,
            next_slot: self.next_slot as i32,
            keep_m: index(self.keep_m),
            keep_d: index(self.keep_d),
            noise: index(self.noise),
        }
    }

    /// The network's input of this row.
    pub fn prepare(&self, slots: &[Vec<f64>]) -> Vec<f64> {
        slots[self.x_slot].iter().map(|x| self.scale_in * x).collect()
    }

    /// What a row does, in plain loops: the specification of the device's code. `m` is the guided raw output,
    /// `noise` all fresh noises; every slot has their length.
    pub fn advance(&self, slots: &mut [Vec<f64>], m: &[f64], noise: &[Vec<f64>]) {
        for (i, &m) in m.iter().enumerate() {
            let mut d = self.dx * slots[self.x_slot][i] + self.dm * m;
            if self.clip > 0.0 {
                d = d.clamp(-self.clip, self.clip);
            }
            let mut next = self.cm * m + self.cd * d;
            for (s, &c) in self.c.iter().enumerate().filter(|(_, c)| **c != 0.0) {
                next += c * slots[s][i];
            }
            if let Some(z) = self.noise {
                next += self.cz * noise[z][i];
            }
            for (slot, value) in [(self.keep_m, m), (self.keep_d, d), (Some(self.next_slot), next)] {
                if let Some(slot) = slot {
                    slots[slot][i] = value;
                }
            }
        }
    }

    /// Slots that this row reads.
    pub fn reads(&self) -> impl Iterator<Item = usize> + '_ {
        (0..MAX_SLOTS).filter(|&s| s == self.x_slot || self.c[s] != 0.0)
    }

    /// Slots that this row writes.
    pub fn writes(&self) -> impl Iterator<Item = usize> {
        [Some(self.next_slot), self.keep_m, self.keep_d].into_iter().flatten()
    }
}

impl Row {
    /// The row as the device computes it, widened.
    pub fn widen(&self) -> Exact {
        let slot = |i: i32| usize::try_from(i).ok();
        Exact {
            timestep: self.timestep as f64,
            scale_in: self.scale_in as f64,
            dx: self.dx as f64,
            dm: self.dm as f64,
            clip: self.clip as f64,
            cm: self.cm as f64,
            cd: self.cd as f64,
            cz: self.cz as f64,
            c: self.c.map(f64::from),
            x_slot: self.x_slot.max(0) as usize,
            next_slot: self.next_slot.max(0) as usize,
            keep_m: slot(self.keep_m),
            keep_d: slot(self.keep_d),
            noise: slot(self.noise),
        }
    }
}

/// What a recorded latent is a mix of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Var {
    /// The n-th state that lies in a slot: the first one, those that are evaluated, and the last.
    State(usize),
    /// The n-th evaluation's raw output.
    Output(usize),
    /// The n-th evaluation's denoised latent, where it is clipped and so no linear mix.
    Denoised(usize),
    /// The n-th fresh noise.
    Noise(usize),
}

/// What a recorded latent is mixed from, with weights.
type Mix = BTreeMap<Var, f64>;

/// A latent that only remembers what it was mixed from. Clones share that memory: once the latent lies in a
/// slot, whoever holds it mixes with the slot.
#[derive(Clone)]
pub(super) struct Trace(Rc<RefCell<Mix>>);

impl Trace {
    fn new(mix: Mix) -> Trace {
        Trace(Rc::new(RefCell::new(mix)))
    }

    fn of(var: Var) -> Trace {
        Trace::new([(var, 1.0)].into())
    }

    /// The state that this is, if it is one as it stands.
    fn state(&self) -> Option<usize> {
        let mix = self.0.borrow();
        match mix.first_key_value() {
            Some((Var::State(n), w)) if *w == 1.0 && mix.len() == 1 => Some(*n),
            _ => None,
        }
    }
}

impl Latent for Trace {
    fn mix(terms: &[(f64, &Trace)]) -> Trace {
        let mut sum = Mix::new();
        for (w, trace) in terms {
            for (var, v) in trace.0.borrow().iter() {
                *sum.entry(*var).or_default() += w * v;
            }
        }
        sum.retain(|_, v| *v != 0.0);
        Trace::new(sum)
    }
}

/// One evaluation: which state, where, and what to make of its output.
struct Evaluation {
    state: usize,
    at: Point,
    conversion: Conversion,
}

/// The model that a sampler is recorded against.
pub(super) struct Recorder<'a> {
    ladder: &'a Ladder,
    evaluations: Vec<Evaluation>,
    /// Per state: the row that writes it and what it is mixed from. The first is given.
    states: Vec<(usize, Mix)>,
    noises: usize,
}

impl Recorder<'_> {
    /// The state that `x` is, put into a slot by the latest row if it is not in one yet.
    fn materialise(&mut self, x: &Trace) -> Result<usize> {
        if let Some(n) = x.state() {
            return Ok(n);
        }
        let Some(row) = self.evaluations.len().checked_sub(1) else {
            return Err(Error::invalid(
                "sampler: mixes its state before the first evaluation: no row can do that",
            ));
        };
        let state = self.states.len();
        self.states.push((row, x.0.replace([(Var::State(state), 1.0)].into())));
        Ok(state)
    }
}

impl Model<Trace> for Recorder<'_> {
    fn predict(&mut self, x: &Trace, at: &Point) -> Result<Prediction<Trace>> {
        let state = self.materialise(x)?;
        let n = self.evaluations.len();
        let c = at.conversion(self.ladder.output)?;
        self.evaluations.push(Evaluation { state, at: *at, conversion: c });
        let (x, m) = (Trace::of(Var::State(state)), Trace::of(Var::Output(n)));
        let denoised = match self.ladder.clip {
            Some(_) => Trace::of(Var::Denoised(n)),
            None => Trace::mix(&[(c.dx, &x), (c.dm, &m)]),
        };
        Ok(Prediction { denoised, noise: Trace::mix(&[(c.nx, &x), (c.nm, &m)]), output: m })
    }

    fn noise(&mut self) -> Result<Trace> {
        self.noises += 1;
        Ok(Trace::of(Var::Noise(self.noises - 1)))
    }
}

/// Records a walk over a ladder; `name` is for errors.
///
/// Fails if the ladder has no steps, or if the walk needs more slots than a row can address.
pub(super) fn record(
    name: &str,
    ladder: &Ladder,
    walk: impl FnOnce(Trace, &Ladder, &mut Recorder<'_>) -> Result<Trace>,
) -> Result<Table> {
    if ladder.steps.is_empty() {
        return Err(Error::invalid(format!("{name}: a ladder without steps has no table")));
    }
    let start = Trace::of(Var::State(0));
    let mut recorder = Recorder { ladder, evaluations: vec![], states: vec![(0, Mix::new())], noises: 0 };
    let end = walk(start, ladder, &mut recorder)?;
    let last = recorder.materialise(&end)?;
    let Recorder { evaluations, states, noises, .. } = recorder;

    let mut plan = Slots::new(&evaluations, &states, last);
    let mut exact = Vec::with_capacity(evaluations.len());
    for (k, e) in evaluations.iter().enumerate() {
        let none = Mix::new();
        let written = states.iter().skip(1).position(|(row, _)| *row == k).map(|i| i + 1);
        let mix = written.map_or(&none, |n| &states[n].1);
        let mut row = Exact {
            timestep: e.at.timestep,
            scale_in: e.at.scale_in,
            dx: e.conversion.dx,
            dm: e.conversion.dm,
            clip: ladder.clip.unwrap_or(0.0),
            cm: 0.0,
            cd: 0.0,
            cz: 0.0,
            c: [0.0; MAX_SLOTS],
            x_slot: plan.slot(Var::State(e.state))?,
            next_slot: 0,
            keep_m: None,
            keep_d: None,
            noise: None,
        };
        for (var, w) in mix {
            match *var {
                Var::Output(n) if n == k => row.cm = *w,
                Var::Denoised(n) if n == k => row.cd = *w,
                Var::Noise(n) if row.noise.is_none() => (row.noise, row.cz) = (Some(n), *w),
                Var::Noise(_) => {
                    return Err(Error::invalid(format!(
                        "{name}: step {k} mixes two fresh noises: a row has one"
                    )));
                }
                var => row.c[plan.slot(var)?] += *w,
            }
        }
        let mut write = |var| {
            plan.place(k, var).ok_or_else(|| {
                Error::invalid(format!(
                    "{name}: step {k} needs more than the {MAX_SLOTS} state slots of a row"
                ))
            })
        };
        row.next_slot = write(written.map(Var::State))?;
        for (var, slot) in [(Var::Output(k), &mut row.keep_m), (Var::Denoised(k), &mut row.keep_d)] {
            *slot = write_if_read(&mut write, var, &states, k)?;
        }
        exact.push(row);
    }
    let rows = exact.iter().map(Exact::pack).collect();
    let last_slot = plan.slot(Var::State(last))?;
    Ok(Table {
        rows,
        exact,
        slots: plan.used,
        noises,
        noise_scale: ladder.noise_scale,
        first_slot: 0,
        last_slot,
    })
}

/// A slot for an answer of row `k` that a later row reads.
fn write_if_read(
    write: &mut impl FnMut(Option<Var>) -> Result<usize>,
    var: Var,
    states: &[(usize, Mix)],
    k: usize,
) -> Result<Option<usize>> {
    let read = states.iter().any(|(row, mix)| *row > k && mix.contains_key(&var));
    read.then(|| write(Some(var))).transpose()
}

/// Which value lies in which slot while the rows run, by the rows that read them.
struct Slots {
    /// The last row that reads a value.
    last_read: BTreeMap<Var, usize>,
    /// What lies in each slot, and the last row that touches it.
    held: [Option<(Option<Var>, usize)>; MAX_SLOTS],
    used: usize,
}

impl Slots {
    fn new(evaluations: &[Evaluation], states: &[(usize, Mix)], last: usize) -> Slots {
        let mut last_read = BTreeMap::new();
        let mut read = |var: Var, row: usize| {
            let at: &mut usize = last_read.entry(var).or_default();
            *at = row.max(*at);
        };
        for (k, e) in evaluations.iter().enumerate() {
            read(Var::State(e.state), k);
        }
        for (row, mix) in states.iter().skip(1) {
            mix.keys().for_each(|var| read(*var, *row));
        }
        read(Var::State(last), usize::MAX);
        let mut slots = Slots { last_read, held: [None; MAX_SLOTS], used: 1 };
        slots.held[0] =
            Some((Some(Var::State(0)), slots.last_read.get(&Var::State(0)).copied().unwrap_or(0)));
        slots
    }

    /// Where a value lies that a row reads: it was placed, and is held until its last read.
    fn slot(&self, var: Var) -> Result<usize> {
        let held = |h: &Option<(Option<Var>, usize)>| h.is_some_and(|(v, _)| v == Some(var));
        self.held
            .iter()
            .position(held)
            .ok_or_else(|| Error::invalid("sampler: a row reads a value that no slot holds"))
    }

    /// A slot for a value that row `k` writes: one that holds nothing that is read in this row or later.
    /// Without a value, a place for what nobody reads.
    fn place(&mut self, k: usize, var: Option<Var>) -> Option<usize> {
        let free = self.held.iter().position(|h| h.is_none_or(|(_, last)| last < k))?;
        let last = var.and_then(|v| self.last_read.get(&v).copied()).unwrap_or(k);
        self.held[free] = Some((var, last.max(k)));
        self.used = self.used.max(free + 1);
        Some(free)
    }
}
