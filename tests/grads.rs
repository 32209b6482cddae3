//! The gradient rule of every room against finite differences of its specification, in f64: the backward graph is evaluated
//! by the specifications of the rooms that it is made of (`tests/ops.rs` checks the code of those), so that what is compared
//! is the rule alone, to nine digits. The rooms come from the list.

use ldm::graph::{Graph, Var, gradients};
use ldm::ops::{Array, Case, ROOMS, Room};
use ldm::rng::Small;
use ldm::tensor::DType;

/// Rooms without a rule, and why. What else has none fails the test.
const NONE: &[(&str, &str)] = &[
    ("prepare", "a sampler's step"),
    ("advance", "a sampler's step"),
    ("blend", "a sampler's step"),
    ("group_stats", "made by the pass that gives norms their statistics, after differentiation"),
    ("linear_group", "made when a program is planned, after differentiation"),
    ("phase_weights", "made when a program is planned, after differentiation"),
    ("adam", "the optimiser"),
    ("square_sum", "the optimiser"),
    ("clip", "the optimiser"),
    ("accumulate", "the optimiser"),
    ("running", "an average of statistics"),
    ("adaptive_weight", "a constant of training"),
    ("scale", "made by training, of gradients"),
    ("timestep", "its input is data"),
    ("sum_rows", "made by gradients"),
    ("slice", "made by gradients"),
    ("sum_pool", "made by gradients"),
    ("dilate", "made by gradients"),
];

/// Elements of each input that are moved.
const SAMPLES: usize = 6;

/// Values of a graph by the specifications of its nodes.
fn evaluate(g: &Graph, leaves: &[(Var, Array)]) -> Vec<Option<Array>> {
    let mut values: Vec<Option<Array>> = vec![None; g.values().len()];
    leaves.iter().for_each(|(v, a)| values[v.index()] = Some(a.clone()));
    for node in g.nodes() {
        let x: Vec<Array> = node.x.iter().map(|v| values[v.index()].clone().expect("made before")).collect();
        for (v, y) in node.y.iter().zip(node.op.spec(&x)) {
            assert_eq!(y.shape, g.shape(*v), "{}: shape of the specification", node.op.name());
            values[v.index()] = Some(y);
        }
    }
    values
}

/// Small cases in f32: listed, and random.
fn cases(room: &Room) -> Vec<Case> {
    let mut r = Small::new(0x6d);
    let listed = (room.cases)().into_iter().filter(|c| !c.bench);
    let random = (0..16).map(|_| (room.random)(&mut r));
    let small = |c: &Case| c.args.iter().map(|a| a.shape.numel()).sum::<usize>() < 20_000;
    listed.chain(random).filter(|c| c.types.contains(&DType::F32) && small(c)).collect()
}

/// Σ over outputs ⟨c, y⟩ of an op, by its specification.
fn objective(case: &Case, x: &[Array], c: &[Array]) -> f64 {
    let y = case.op.spec(x);
    y.iter().zip(c).map(|(y, c)| y.data.iter().zip(&c.data).map(|(y, c)| y * c).sum::<f64>()).sum()
}

/// Builds the gradient of a case and compares it with central differences. `Ok(false)` where there is no rule.
fn check(case: &Case, seed: u64) -> Result<bool, String> {
    let (x, specs) = (case.inputs(DType::F32, seed), case.specs(DType::F32));
    let mut g = Graph::new();
    let vars: Vec<Var> =
        specs.iter().enumerate().map(|(i, s)| g.input(&format!("x{i}"), s.dtype, s.shape)).collect();
    let y = g.push_all("op", case.op.clone(), &vars).map_err(|e| e.to_string())?;
    let mut r = Small::new(seed + 1);
    let (mut seeds, mut leaves, mut weights) = (vec![], vec![], vec![]);
    for &v in &y {
        let spec = g.spec(v);
        let float = spec.dtype != DType::I32;
        let c = Array::from_fn(spec.shape, |_| if float { DType::F32.round(r.normal()) } else { 0.0 });
        if float {
            let dy = g.input("dy", spec.dtype, spec.shape);
            seeds.push((v, dy));
            leaves.push((dy, c.clone()));
        }
        weights.push(c);
    }
    let floats: Vec<usize> = (0..x.len()).filter(|&i| specs[i].dtype != DType::I32).collect();
    let wrt: Vec<Var> = floats.iter().map(|&i| vars[i]).collect();
    let mut built = gradients(&mut g.clone(), &seeds, &wrt, &[]);
    if seeds.len() > 1 && matches!(built, Err(ldm::Error::NoGradient(_))) {
        // A loss has a gradient, what it says of single images has none; so has a norm, and its statistics.
        for (_, dy) in seeds.split_off(1) {
            leaves.iter_mut().filter(|(v, _)| *v == dy).for_each(|(_, c)| c.data.fill(0.0));
        }
        weights[1..].iter_mut().for_each(|c| c.data.fill(0.0));
        built = gradients(&mut g.clone(), &seeds, &wrt, &[]);
    }
    if matches!(built, Err(ldm::Error::NoGradient(_))) {
        return Ok(false);
    }
    let found =
        gradients(&mut g, &seeds, &wrt, &[]).map_err(|e| format!("{}: {e}", case.name(DType::F32)))?;
    leaves.extend(vars.iter().copied().zip(x.iter().cloned()));
    let values = evaluate(&g, &leaves);
    for (&i, dx) in floats.iter().zip(found) {
        let n = x[i].data.len();
        if room_data(case, i) {
            continue;
        }
        // Each sampled element by itself, and all of them at once along a random direction.
        let mut directions: Vec<Vec<(usize, f64)>> =
            (0..SAMPLES.min(n)).map(|_| vec![(r.below(n), 1.0)]).collect();
        directions.push((0..n).map(|k| (k, r.normal())).collect());
        for direction in directions {
            let rule: f64 = match dx {
                None => 0.0,
                Some(v) => {
                    let dx = values[v.index()].as_ref().expect("evaluated");
                    direction.iter().map(|&(k, d)| d * dx.data[k]).sum()
                }
            };
            let moved = |h: f64| {
                let mut x = x.clone();
                direction.iter().for_each(|&(k, d)| x[i].data[k] += h * d);
                objective(case, &x, &weights)
            };
            // Richardson: two central differences, whose errors of second order cancel.
            let h = 1e-4;
            let central = |h: f64| (moved(h) - moved(-h)) / (2.0 * h);
            let difference = (4.0 * central(h / 2.0) - central(h)) / 3.0;
            // What rounding leaves of the objective, divided by h.
            let noise = 1e-11 * objective(case, &x, &weights).abs();
            let size = 1.0 + direction.iter().map(|(_, d)| d * d).sum::<f64>().sqrt();
            let scale = rule.abs().max(difference.abs()).max(1e-3 * size);
            if !((rule - difference).abs() <= 2e-6 * scale + noise) {
                let at = if direction.len() == 1 {
                    format!("[{}]", direction[0].0)
                } else {
                    " along a direction".into()
                };
                return Err(format!(
                    "{}: gradient of input {i}{at}: the rule gives {rule}; differences give {difference}",
                    case.name(DType::F32)
                ));
            }
        }
    }
    Ok(true)
}

/// Inputs that are data whatever they hold: no gradient is asked of them.
fn room_data(case: &Case, input: usize) -> bool {
    use ldm::ops::Op;
    matches!(
        (&case.op, input),
        (Op::Gaussian(_), 1) | (Op::Loss(_), 1 | 2) | (Op::BatchNorm(_), 3 | 4) | (Op::Perceptual(_), 1..=3)
    )
}

fn run(room: &Room) {
    if room.name == "quantize" {
        // Piecewise constant: its rule is an estimator, tested below.
        return;
    }
    let mut ruled = 0;
    for (i, case) in cases(room).iter().enumerate() {
        match check(case, 300 + i as u64) {
            Ok(rule) => ruled += rule as usize,
            Err(e) => panic!("{}: case {i}: {e}", room.name),
        }
    }
    // A gradient is not differentiated again.
    let listed = NONE.iter().any(|(name, _)| *name == room.name) || room.name.ends_with("_grad");
    assert_eq!(
        ruled == 0,
        listed,
        "{}: {ruled} cases have a gradient, and it is {listed} that it has none",
        room.name
    );
}

/// The room of this name.
fn room(name: &str) -> &'static Room {
    ROOMS.iter().find(|r| r.name == name).expect("the list and its macro agree")
}

macro_rules! suite {
    ($($file:ident : $($Op:ident),+ ;)+) => {
        $(#[test]
        fn $file() {
            $(run(room(<ldm::ops::$Op as ldm::ops::Operation>::NAME));)+
        })+
    };
}
ldm::rooms!(suite);

#[test]
fn quantisation_passes_gradients_straight_through() {
    let mut g = Graph::new();
    let (z, book) = (g.input("z", DType::F32, [5, 3]), g.input("book", DType::F32, [7, 3]));
    let y = g.push("q", ldm::ops::Quantize, &[z, book]).unwrap();
    let dy = g.input("dy", DType::F32, [5, 3]);
    assert_eq!(gradients(&mut g, &[(y, dy)], &[z, book], &[]).unwrap(), [Some(dy), None]);
}
