//! The shapes that group norms are tested and measured on.

use super::super::Op;
use super::super::activation::Act;
use super::super::prelude::*;
use super::{Given, GroupNorm, SLAB};

pub(super) fn listed() -> Vec<Case> {
    let norm = |groups, eps, act, x: &[usize]| {
        let c = x[x.len() - 1];
        let weight = t([c]).normal(1.0, 0.2);
        Case::new(GroupNorm::new(groups, eps, act), [t(x), weight, t([c])])
    };
    let far = |case: Case| {
        case.only(&[DType::F32]).loose(
            8.0,
            "the norm bound assumes |y| near |x|; here the input's own rounding is 1e-3 of its deviation",
        )
    };
    let mut plain_far = norm(4, 1e-5, Act::None, &[2, 9, 7, 32]);
    plain_far.args[0] = t([2, 9, 7, 32]).normal(100.0, 0.01);
    let one = |groups, act, x: &[usize]| given(groups, act, &x[..x.len() - 1], &x[x.len() - 1..], 0.0, 1.0);
    let two = |groups, act, x: &[usize], c: [usize; 2]| given(groups, act, x, &c, 0.5, 1.0);
    let mut small = vec![
        norm(1, 1e-5, Act::None, &[1, 1, 1, 4]),
        norm(2, 1e-5, Act::None, &[2, 3, 3, 4]),
        norm(32, 1e-5, Act::Silu, &[2, 8, 8, 32]),
        norm(32, 1e-6, Act::Silu, &[3, 5, 7, 96]),
        norm(32, 1e-6, Act::None, &[1, 16, 16, 64]),
        norm(16, 1e-5, Act::Silu, &[2, 6, 5, 80]),
        norm(3, 1e-5, Act::None, &[1, 40, 9]),
        norm(32, 1e-5, Act::Silu, &[1, 33, 31, 160]),
        // More channels in a group than a block takes at once, in fours and one by one.
        norm(1, 1e-5, Act::Silu, &[1, 2, 3, 1028]),
        norm(2, 1e-5, Act::None, &[2, 1, 5, 514]),
        far(plain_far),
        one(1, Act::None, &[1, 8, 8, 8]),
        one(8, Act::Silu, &[3, 64, 8]),
        one(4, Act::Silu, &[2, 8, 16, 40]),
        one(1, Act::None, &[1, 8, 8, 320]),
        one(32, Act::Silu, &[2, 16, 16, 96]),
        one(3, Act::Silu, &[1, 8, 40, 72]),
        // 65 slabs, merged in fives; 67, which nothing divides.
        one(2, Act::Silu, &[2, 65, 64, 16]),
        two(2, Act::None, &[1, 67, 64], [8, 8]),
        // Wide strips, of more than 64 slabs: groups that straddle them, teams of several warps, a seam inside one, an end, more groups
        // than the block has warps, and more slabs than leave 16.
        one(4, Act::Silu, &[1, 66, 64, 160]),
        two(1, Act::Silu, &[1, 66, 64], [88, 24]),
        one(64, Act::Silu, &[1, 66, 64, 64]),
        one(2, Act::None, &[1, 1040, 64, 8]),
        // A group of more channels than a block has threads; two rounds of a thread's slabs.
        one(1, Act::None, &[1, 8, 8, 640]),
        one(2, Act::Silu, &[1, 33, 64, 176]),
        // Seams inside a group, inside a strip, and between strips.
        two(4, Act::Silu, &[2, 8, 16], [24, 16]),
        two(3, Act::None, &[1, 8, 8], [64, 32]),
        two(2, Act::Silu, &[1, 16, 16], [8, 152]),
        // Scale and shift: one row for all images, a row for each, that of an evaluation.
        film(norm(4, 1e-5, Act::Silu, &[3, 5, 7, 24]), 3, false),
        film(norm(2, 1e-5, Act::None, &[2, 6, 5, 10]), 1, false),
        film(norm(8, 1e-5, Act::Silu, &[2, 4, 3, 16]), 5, true),
        film(one(4, Act::Silu, &[2, 8, 16, 40]), 2, false),
        film(one(2, Act::None, &[3, 8, 8, 64]), 1, false),
        film(one(4, Act::Silu, &[2, 66, 64, 72]), 2, false),
        film(one(32, Act::Silu, &[2, 16, 16, 96]), 4, true),
        film(two(4, Act::Silu, &[2, 8, 16], [24, 16]), 2, false),
        far(given(4, Act::None, &[2, 8, 16], &[40], 100.0, 0.01)),
        far(given(2, Act::Silu, &[1, 65, 64], &[16, 8], 100.0, 0.01)),
    ];
    // UNets of SD 1.5, SDXL and LDM 1.45B; KL-f8 at 512×512 and VQ-f4 at 256×256, without a batch. Before attention
    // there is no activation: one of those in each size stands for them.
    let real: [(usize, usize, &[usize]); 10] = [
        (2, 128, &[320, 640, 960]),
        (2, 64, &[320, 640, 960, 1280, 1920]),
        (2, 32, &[320, 640, 960, 1280, 1920, 2560]),
        (2, 16, &[320, 640, 960, 1280, 1920, 2560]),
        (2, 8, &[640, 1280, 1920, 2560]),
        (2, 4, &[1280, 2560]),
        (1, 64, &[512]),
        (1, 128, &[256, 512]),
        (1, 256, &[128, 256, 512]),
        (1, 512, &[128, 256]),
    ];
    for (b, side, channels) in real {
        let eps = if b == 1 { 1e-6 } else { 1e-5 };
        let case = |act, c| norm(32, eps, act, &[b, side, side, c]).weights(1..3).bench();
        small.extend(channels.iter().map(|&c| case(Act::Silu, c)));
    }
    for (b, side, c) in [(2, 64, 320), (2, 32, 640), (2, 16, 1280), (2, 8, 1280), (1, 64, 512)] {
        small.push(norm(32, 1e-6, Act::None, &[b, side, side, c]).weights(1..3).bench());
        small.push(one(32, Act::Silu, &[b, side, side, c]).weights(1..3).bench());
    }
    for (side, c) in [(64, [640, 320]), (32, [1280, 640]), (16, [1280, 1280]), (8, [1280, 1280])] {
        small.push(two(32, Act::Silu, &[2, side, side], c).weights(2..4).bench());
    }
    small.push(one(32, Act::Silu, &[1, 512, 512, 128]).weights(1..3).bench());
    small
}

pub(super) fn random(r: &mut Small) -> Case {
    let groups = [1, 2, 3, 8, 32][r.below(5)];
    let c = groups * (r.below(6) + 1);
    let x = [r.below(3) + 1, r.below(12) + 2, r.below(12) + 2, c];
    let act = [Act::None, Act::Silu][r.below(2)];
    if r.below(2) == 0 {
        let c: Vec<usize> = (0..r.below(2) + 1).map(|_| 8 * (r.below(8) + 1)).collect();
        let all: usize = c.iter().sum();
        let groups = [1, 2, 4, 8, all / 8, all][r.below(6)];
        return given(groups, act, &[r.below(3) + 1, 8, 8 * (r.below(3) + 1)], &c, 0.3, 2.0);
    }
    Case::new(GroupNorm::new(groups, 1e-5, act), [t(x).normal(0.3, 2.0), t([c]).normal(1.0, 0.2), t([c])])
}

/// The same with `rows` of scale and shift, of which with `step` a counter picks one.
fn film(mut case: Case, rows: usize, step: bool) -> Case {
    let Op::GroupNorm(op) = &mut case.op else { return case };
    let at = op.given.sources() + 2;
    (op.film, op.step) = (true, step);
    let c = case.args[at - 1].shape.last();
    case.args.insert(at, t([rows, 2 * c]).normal(0.0, 0.5));
    if step {
        case.args.insert(at + 1, ids([4], rows));
    }
    case
}

/// A norm that is given statistics: x with these leading axes and, as one or two tensors, `c` channels, of this mean and
/// deviation. The statistics are drawn, like x, so that they are what the result is computed from.
fn given(groups: usize, act: Act, lead: &[usize], c: &[usize], mean: f64, deviation: f64) -> Case {
    let form = if c.len() == 2 { Given::Halves } else { Given::Stats };
    let (mut r, all) = (Small::new(c[0] as u64), c.iter().sum::<usize>());
    let x = |&c: &usize| t([lead, &[c]].concat().as_slice()).normal(mean, deviation);
    let mut args: Vec<_> = c.iter().map(x).collect();
    args.push(t([all]).normal(1.0, 0.2));
    args.push(t([all]));
    for c in c {
        let mut entry = || {
            let squares = SLAB as f64 * (deviation * (0.6 + 0.1 * r.below(9) as f64)).powi(2);
            [mean + 0.3 * deviation * r.normal(), squares]
        };
        // Prime, so that slabs and channels differ when it is repeated.
        let values = (0..1009).flat_map(|_| entry()).collect();
        args.push(f32s([lead.iter().product::<usize>() / SLAB, *c, 2]).values(values));
    }
    let op = GroupNorm { given: form, ..GroupNorm::new(groups, 1e-5, act) };
    Case::new(op, args)
}
