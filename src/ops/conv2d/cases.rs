//! The shapes that products are tested and measured on.

use super::super::Op;
use super::super::activation::Act;
use super::super::prelude::*;
use super::{Choice, Conv2d, Epi, Linear};

const SIXTEEN: &[DType] = &[DType::F16, DType::BF16];

pub(super) fn conv() -> Vec<Case> {
    let same = |kernel| Conv2d::same(kernel);
    let with = |f: &dyn Fn(&mut Conv2d)| {
        let mut op = Conv2d::same(3);
        f(&mut op);
        op
    };
    let full = |act| with(&|o| o.epi = Epi { bias: true, time: true, act, residual: true, ..Epi::default() });
    let down = |pad| with(&|o| (o.stride, o.pad) = (2, pad));
    let up = with(&|o| o.upsample = true);
    let bare = with(&|o| o.epi = Epi::default());
    let conv = |op: Conv2d, x: [usize; 4], o: usize, k: usize| {
        let w = t([o, k, k, x[3]]).normal(0.0, 1.0 / (k as f64 * (x[3] as f64).sqrt()));
        let mut args = vec![t(x), w];
        let (dh, dw) = {
            let s = op.shape(x.into(), [o, k, k, x[3]].into());
            s.map_or((1, 1), |s| (s.out_h, s.out_w))
        };
        args.extend(op.epi.bias.then(|| t([o])));
        args.extend(op.epi.time.then(|| if op.epi.step { t([5, o]) } else { t([x[0], o]) }));
        args.extend(op.epi.step.then(|| ids([4], 5)));
        args.extend(op.epi.residual.then(|| t([x[0], dh, dw, o])));
        Case::new(op, args)
    };
    // With inputs of a shortcut, `u` channels each.
    let shortcut = |op: Conv2d, x: [usize; 4], o: usize, u: &[usize]| {
        let mut case = conv(Conv2d { shortcut: u.len(), ..op }, x, o, 3).only(SIXTEEN);
        let width: usize = u.iter().sum();
        case.args.extend(u.iter().map(|&u| t([x[0], x[1], x[2], u])));
        case.args.extend([t([o, width]).normal(0.0, 1.0 / (width as f64).sqrt()), t([o])]);
        case
    };
    let stats = |op: &Conv2d| Conv2d { epi: Epi { stats: true, ..op.epi.clone() }, ..op.clone() };
    // Behind an upsampling in four phases: w is (4,O,2,2,C).
    let phases = |stats: bool, x: [usize; 4], o: usize| {
        let epi = Epi { stats, ..up.epi.clone() };
        let w = t([4, o, 2, 2, x[3]]).normal(0.0, 1.0 / (2.0 * (x[3] as f64).sqrt()));
        let case = Case::new(Conv2d { epi, phases: true, ..up.clone() }, [t(x), w, t([o])]);
        if stats { case.only(SIXTEEN) } else { case }
    };
    let mut small = vec![
        conv(same(3), [1, 1, 1, 1], 1, 3),
        conv(same(3), [2, 8, 8, 32], 32, 3),
        conv(same(3), [3, 5, 7, 3], 65, 3),
        conv(same(1), [1, 9, 4, 33], 17, 1),
        conv(same(3), [1, 6, 6, 64], 3, 3),
        conv(full(Act::None), [2, 7, 5, 20], 70, 3),
        conv(full(Act::Silu), [3, 4, 4, 8], 12, 3),
        conv(with(&|o| (o.epi.time, o.epi.step) = (true, true)), [2, 5, 4, 16], 24, 3),
        conv(with(&|o| (o.epi.time, o.epi.step) = (true, true)), [1, 3, 4, 5], 7, 3),
        conv(down([1; 4]), [2, 8, 8, 16], 16, 3),
        conv(down([1; 4]), [1, 7, 9, 5], 6, 3),
        conv(down([0, 0, 1, 1]), [1, 8, 6, 16], 24, 3),
        conv(up.clone(), [2, 3, 4, 16], 16, 3),
        conv(bare.clone(), [1, 10, 10, 4], 320, 3),
        conv(same(5), [1, 6, 6, 3], 4, 5),
        conv(full(Act::None), [2, 13, 11, 48], 40, 3),
        conv(up.clone(), [1, 7, 9, 32], 33, 3),
        conv(with(&|o| o.pad = [0, 2, 1, 1]), [3, 16, 10, 64], 24, 3),
        conv(bare.clone(), [1, 9, 9, 544], 20, 3),
        // For tensor cores: sums in several parts, and every tile with rows and columns to spare.
        conv(full(Act::None), [2, 4, 4, 256], 72, 3),
        conv(same(3), [3, 8, 8, 40], 160, 3),
        conv(down([1; 4]), [2, 9, 7, 48], 80, 3),
        conv(down([0, 0, 1, 1]), [1, 8, 8, 64], 64, 3),
        conv(up.clone(), [2, 5, 6, 40], 96, 3),
        conv(full(Act::Silu), [1, 64, 96, 8], 312, 3).only(SIXTEEN),
        conv(same(3), [1, 128, 127, 8], 250, 3).only(SIXTEEN),
        phases(false, [2, 8, 8, 32], 40),
        phases(true, [3, 8, 16, 40], 64),
        phases(false, [1, 4, 32, 256], 24),
        phases(true, [1, 64, 64, 8], 160),
        shortcut(same(3), [2, 8, 8, 64], 64, &[96]),
        shortcut(same(3), [1, 7, 5, 40], 72, &[24, 48]),
        shortcut(stats(&same(3)), [2, 8, 8, 64], 96, &[128, 40]),
        conv(stats(&full(Act::None)), [2, 8, 16, 32], 64, 3).only(SIXTEEN),
        conv(stats(&same(3)), [1, 64, 64, 16], 320, 3).only(SIXTEEN),
        conv(stats(&down([1; 4])), [1, 16, 16, 256], 40, 3).only(SIXTEEN),
        conv(stats(&same(3)), [129, 8, 8, 16], 256, 3).only(SIXTEEN),
        // First layers: every number of channels, tails of pixels and of channels, statistics, blocks that walk over two tiles.
        conv(same(3), [2, 5, 7, 3], 24, 3),
        conv(bare.clone(), [3, 9, 8, 4], 72, 3),
        conv(same(3), [1, 10, 13, 8], 40, 3),
        conv(same(3), [1, 3, 50, 9], 64, 3),
        conv(with(&|o| o.pad = [0, 2, 1, 0]), [3, 16, 10, 4], 24, 3),
        conv(stats(&same(3)), [2, 8, 8, 3], 128, 3).only(SIXTEEN),
        conv(stats(&same(3)), [3, 8, 16, 4], 80, 3).only(SIXTEEN),
        conv(stats(&bare), [1, 16, 4, 9], 8, 3).only(SIXTEEN),
        conv(same(3), [33, 32, 64, 4], 8, 3).only(SIXTEEN),
    ];
    // Tiles of the f32 kernel that small sizes do not take by themselves, with rows and columns to spare, whole and split.
    let asked =
        |variant, splits, op: &Conv2d| Conv2d { choice: Some(Choice { variant, splits }), ..op.clone() };
    let asked = |variant, splits, op, x, o| conv(asked(variant, splits, op), x, o, 3).only(&[DType::F32]);
    small.extend([
        asked("BM=128,BN=128", 1, &full(Act::Silu), [2, 9, 11, 20], 132),
        asked("BM=128,BN=128", 2, &same(3), [2, 8, 9, 16], 130),
        asked("BM=128,BN=64", 1, &up, [1, 9, 8, 12], 68),
        asked("BM=128,BN=64", 2, &full(Act::None), [3, 8, 8, 16], 100),
        asked("BM=64,BN=64", 1, &down([1; 4]), [2, 16, 18, 36], 65),
    ]);
    // And each of those for tensor cores; two, three and four splits; images of less and of more than a tile; sums of one k-block.
    let asked = |variant, splits, op, x, o| {
        conv(Conv2d { choice: Some(Choice { variant, splits }), ..op }, x, o, 3).only(SIXTEEN)
    };
    small.extend([
        asked("BM=64,BN=80", 1, full(Act::Silu), [2, 5, 7, 40], 88),
        asked("BM=64,BN=80", 1, stats(&same(3)), [2, 8, 8, 16], 80),
        asked("BM=64,BN=80", 3, same(3), [3, 8, 8, 48], 84),
        asked("BM=64,BN=80", 4, full(Act::None), [2, 5, 7, 48], 88),
        asked("BM=128,BN=80", 1, full(Act::None), [3, 7, 9, 40], 88),
        asked("BM=128,BN=80", 2, stats(&same(3)), [3, 8, 8, 40], 160),
        asked("BM=128,BN=160", 1, full(Act::Silu), [3, 7, 9, 72], 168),
        asked("BM=128,BN=160", 2, stats(&same(3)), [3, 8, 8, 40], 320),
        asked("BM=128,BN=160", 3, full(Act::None), [2, 8, 16, 48], 83),
        asked("BM=128,BN=128", 1, full(Act::None), [2, 8, 16, 24], 132),
        asked("BM=128,BN=128", 4, stats(&same(3)), [3, 8, 8, 40], 128),
        asked("BM=64,BN=160", 2, full(Act::Gelu), [3, 5, 7, 72], 90),
        asked("BM=64,BN=64", 3, full(Act::None), [2, 8, 8, 48], 88),
    ]);
    let real = |op, [b, side, c, o]: [usize; 4], k| conv(op, [b, side, side, c], o, k).weights(1..3).bench();
    for &(b, side, c, outs) in REAL {
        // A block that changes the channels has a 1×1 beside it; one that does not may change the size.
        small.extend(outs.iter().map(|&o| real(same(3), [b, side, c, o], 3)));
        small.extend(outs.iter().filter(|&&o| o != c).map(|&o| real(same(1), [b, side, c, o], 1)));
    }
    small.extend(REAL_DOWN.map(|[side, c]| real(down([1; 4]), [2, side, c, c], 3)));
    small.extend(REAL_UP.map(|[b, side, c]| real(up.clone(), [b, side, c, c], 3)));
    small.extend(REAL_EDGE.map(|x| real(same(3), x, 3)));
    small.extend([3, 4].map(|c| real(same(1), [1, 64, c, c], 1)));
    small
}

pub(super) fn random_conv(r: &mut Small) -> Case {
    let k: usize = [1, 3, 3, 4][r.below(4)];
    // Half of them for tensor cores.
    let c = if r.below(2) == 0 { 8 * (r.below(10) + 1) } else { r.below(40) + 1 };
    let x = [r.below(3) + 1, r.below(9) + 1, r.below(9) + 1, c];
    let o = r.below(72) + 1;
    let mut pad = [0; 4];
    pad.iter_mut().for_each(|p| *p = r.below(k.div_ceil(2) + 1));
    pad[2] += k.saturating_sub(x[1] + pad[0] + pad[2]);
    pad[3] += k.saturating_sub(x[2] + pad[1] + pad[3]);
    let epi = Epi { bias: r.below(2) == 0, time: r.below(3) == 0, ..Epi::default() };
    let op = Conv2d { stride: r.below(2) + 1, pad, upsample: r.below(4) == 0, epi, ..Conv2d::same(k) };
    let w = t([o, k, k, x[3]]).normal(0.0, 1.0 / (k as f64 * (x[3] as f64).sqrt()));
    let mut args = vec![t(x), w];
    args.extend(op.epi.bias.then(|| t([o])));
    args.extend(op.epi.time.then(|| t([1, o])));
    Case::new(op, args)
}

pub(super) fn linear() -> Vec<Case> {
    let linear = |x: &[usize], o: usize, epi: Epi| {
        let c = x[x.len() - 1];
        let mut args = vec![t(x), t([o, c]).normal(0.0, 1.0 / (c as f64).sqrt())];
        args.extend(epi.bias.then(|| t([o])));
        args.extend(epi.residual.then(|| t(Shape::new(x).with_last(o))));
        Case::new(Linear { epi, ..Linear::default() }, args)
    };
    let bias = Epi { bias: true, ..Epi::default() };
    let res = Epi { residual: true, ..bias.clone() };
    let act = |act| Epi { act, ..bias.clone() };
    let three = |x: &[usize], o: usize| {
        let w = t([o, x[x.len() - 1]]).normal(0.0, 1.0 / (x[x.len() - 1] as f64).sqrt());
        Case::new(Linear { more: 2, ..Linear::default() }, [t(x), w.clone(), w.clone(), w]).only(SIXTEEN)
    };
    let gates = Epi { glu: true, ..bias.clone() };
    let stats = Epi { stats: true, ..res.clone() };
    let mut small = vec![
        linear(&[1, 1], 1, Epi::default()),
        linear(&[1, 320], 1280, bias.clone()),
        linear(&[2, 77, 32], 32, Epi::default()),
        linear(&[2, 77, 32], 37, act(Act::QuickGelu)),
        linear(&[3, 5, 37], 65, act(Act::Gelu)),
        linear(&[2, 4, 4, 64], 64, res.clone()),
        linear(&[130, 129], 67, res),
        linear(&[2, 3, 100], 1, act(Act::Silu)),
        linear(&[5, 768], 3, bias.clone()),
        // For tensor cores: gates, sums in several parts, every tile with rows and columns to spare.
        linear(&[2, 50, 40], 2 * 24, gates.clone()).only(SIXTEEN),
        linear(&[70, 512], 2 * 136, gates.clone()).only(SIXTEEN),
        linear(&[8190, 8], 2 * 328, gates.clone()).only(SIXTEEN),
        linear(&[20, 2048], 72, bias.clone()),
        linear(&[8190, 16], 312, bias.clone()).only(SIXTEEN),
        linear(&[2, 64, 40], 136, stats).only(SIXTEEN),
        three(&[2, 35, 48], 48),
        three(&[3, 70, 64], 320),
    ];
    // Tiles that small sizes do not take by themselves; one k-block, and many in five splits.
    let asked = |variant, splits, mut case: Case| {
        if let Op::Linear(op) = &mut case.op {
            op.choice = Some(Choice { variant, splits });
        }
        case.only(SIXTEEN)
    };
    small.extend([
        asked("BM=64,BN=80", 1, linear(&[70, 24], 90, bias.clone())),
        asked("BM=64,BN=80", 5, linear(&[66, 696], 80, bias.clone())),
        asked("BM=64,BN=160", 2, linear(&[70, 264], 2 * 136, gates.clone())),
        asked("BM=128,BN=128", 3, linear(&[140, 392], 2 * 48, gates.clone())),
        asked("BM=64,BN=80", 2, three(&[70, 256], 80)),
        asked("BM=128,BN=160", 1, linear(&[140, 72], 2 * 88, gates.clone())),
        asked("BM=128,BN=160", 2, three(&[140, 256], 160)),
        asked("BM=64,BN=64", 1, linear(&[70, 72], 2 * 40, gates.clone())),
    ]);
    for (rows, c) in REAL_TOKENS {
        // Output and queries; queries, keys and values at once; the two of the feed-forward.
        let products = [(c, c), (c, 3 * c), (c, 8 * c), (4 * c, c)];
        small.extend(products.map(|(c, o)| linear(&[rows, c], o, bias.clone()).weights(1..3).bench()));
    }
    for &(rows, c, outs) in REAL_LINEAR {
        small.extend(outs.iter().map(|&o| linear(&[rows, c], o, bias.clone()).weights(1..3).bench()));
    }
    small
}

pub(super) fn random_linear(r: &mut Small) -> Case {
    // Half of them for tensor cores.
    let c = if r.below(2) == 0 { 8 * (r.below(30) + 1) } else { r.below(150) + 1 };
    let (rows, o) = (r.below(90) + 1, r.below(150) + 1);
    let epi = Epi { bias: r.below(2) == 0, residual: r.below(2) == 0, ..Epi::default() };
    let mut args = vec![t([rows, c]), t([o, c]).normal(0.0, 1.0 / (c as f64).sqrt())];
    args.extend(epi.bias.then(|| t([o])));
    args.extend(epi.residual.then(|| t([rows, o])));
    Case::new(Linear { epi, ..Linear::default() }, args)
}

/// Convolutions 3×3 that keep the size, for the benches: images, side, C, each O. UNets of SD 1.5 (64×64 latents), SDXL
/// (128×128) and LDM 1.45B (32×32) with guidance; decoders of KL-f8 (512×512 pixels) and VQ-f4 (256×256).
const REAL: &[(usize, usize, usize, &[usize])] = &[
    (2, 128, 320, &[320]),
    (2, 128, 640, &[320]),
    (2, 128, 960, &[320]),
    (2, 64, 320, &[320, 640]),
    (2, 64, 640, &[320, 640]),
    (2, 64, 960, &[320, 640]),
    (2, 64, 1280, &[640]),
    (2, 64, 1920, &[640]),
    (2, 32, 320, &[320, 640]),
    (2, 32, 640, &[320, 640, 1280]),
    (2, 32, 960, &[320, 640]),
    (2, 32, 1280, &[640, 1280]),
    (2, 32, 1920, &[640, 1280]),
    (2, 32, 2560, &[1280]),
    (2, 16, 320, &[640]),
    (2, 16, 640, &[640, 1280]),
    (2, 16, 960, &[640]),
    (2, 16, 1280, &[640, 1280]),
    (2, 16, 1920, &[640, 1280]),
    (2, 16, 2560, &[1280]),
    (2, 8, 640, &[1280]),
    (2, 8, 1280, &[1280]),
    (2, 8, 1920, &[1280]),
    (2, 8, 2560, &[1280]),
    (2, 4, 1280, &[1280]),
    (2, 4, 2560, &[1280]),
    (1, 64, 512, &[512]),
    (1, 128, 256, &[256]),
    (1, 128, 512, &[256, 512]),
    (1, 256, 128, &[128]),
    (1, 256, 256, &[128, 256]),
    (1, 256, 512, &[256]),
    (1, 512, 128, &[128]),
    (1, 512, 256, &[128]),
];

/// With stride 2: side and channels of two images.
const REAL_DOWN: [[usize; 2]; 8] =
    [[128, 320], [64, 320], [64, 640], [32, 320], [32, 640], [16, 640], [16, 1280], [8, 1280]];

/// Behind a nearest upsampling: images, side before it, channels.
const REAL_UP: [[usize; 3]; 11] = [
    [2, 64, 640],
    [2, 32, 640],
    [2, 32, 1280],
    [2, 16, 640],
    [2, 16, 1280],
    [2, 8, 1280],
    [2, 4, 1280],
    [1, 256, 256],
    [1, 128, 256],
    [1, 128, 512],
    [1, 64, 512],
];

/// First and last layers: images, side, C, O.
const REAL_EDGE: [[usize; 4]; 13] = [
    [2, 128, 4, 320],
    [2, 128, 320, 4],
    [2, 64, 4, 320],
    [2, 64, 8, 320],
    [2, 64, 9, 320],
    [2, 64, 320, 4],
    [2, 32, 4, 320],
    [2, 32, 320, 4],
    [1, 64, 3, 512],
    [1, 64, 4, 512],
    [1, 256, 128, 3],
    [1, 512, 128, 3],
    [1, 512, 3, 128],
];

/// Rows and width of the transformers in those UNets.
const REAL_TOKENS: [(usize, usize); 9] = [
    (8192, 320),
    (8192, 640),
    (2048, 320),
    (2048, 640),
    (2048, 1280),
    (512, 640),
    (512, 1280),
    (128, 1280),
    (32, 1280),
];

/// Rows, C, each O: attention of the decoders, keys and values of the text, embeddings of the time.
const REAL_LINEAR: &[(usize, usize, &[usize])] = &[
    (4096, 512, &[512, 1536]),
    (154, 768, &[320, 640, 1280, 2560]),
    (154, 1280, &[640, 1280, 2560]),
    (154, 2048, &[1280, 2560]),
    (2, 320, &[1280]),
    (2, 1280, &[320, 640, 1280]),
    (2, 2816, &[1280]),
];
