//! y = [a | b] on the last axis: skip connections, and channels of a condition.
//!
//! PyTorch (channels last): `torch.cat([a, b], -1)`. Kernel: `kernels/concat.cu`.
use super::prelude::*;
use crate::kernels::concat as k;
use crate::kernels::concat_slice as part;

/// a (…,A) and b (…,C) to (…,A+C).
#[derive(Clone, PartialEq, Debug)]
pub struct Concat;

impl Operation for Concat {
    const NAME: &'static str = "concat";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "a (…,A), b (…,C) of one float type";
        let [a, b] = args(Self::NAME, want, x)?;
        let lead = |s: Spec| s.shape.with_last(0);
        let fits = a.dtype == b.dtype && lead(a) == lead(b) && DType::FLOATS.contains(&a.dtype);
        ensure!(fits && !a.shape.is_empty(), Self::NAME, want, x);
        Ok(vec![Spec::new(a.dtype, a.shape.with_last(a.shape.last() + b.shape.last()))])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (a, b) = (x[0].shape.last(), x[1].shape.last());
        let rows = x[0].data.chunks(a).zip(x[1].data.chunks(b));
        vec![Array {
            shape: x[0].shape.with_last(a + b),
            data: rows.flat_map(|(a, b)| a.iter().chain(b).copied()).collect(),
        }]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (a, b) = (io.slice(0), io.slice(1));
        let (na, nb) = (io.x[0].shape.last(), io.x[1].shape.last());
        io.rows(0, na + nb, |first, y| {
            for (i, y) in y.chunks_mut(na + nb).enumerate() {
                a.read((first + i) * na, &mut y[..na]);
                b.read((first + i) * nb, &mut y[na..]);
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let y = io.y_spec(0);
        let (a, b) = (io.x_spec(0).shape.last(), io.x_spec(1).shape.last());
        let n = y.shape.numel() / launch::at_once(y.dtype, &[a, b]);
        let p = k::ConcatFwd {
            y: io.y(0),
            a: io.x(0),
            b: io.x(1),
            n: io.int(n)?,
            a_len: io.int(a)?,
            b_len: io.int(b)?,
        };
        io.launch(k::CONCAT_FWD, y.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(0, x, y)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None; 2]) };
        let [a, b] = [0, 1].map(|i| g.shape(x[i]).last());
        let mut part = |label, start, len| g.push(label, Slice { start, len }, &[*dy]).map(Some);
        Ok(vec![part("da", 0, a)?, part("db", a, b)?])
    }

    fn cases() -> Vec<Case> {
        let cat = |lead: &[usize], a: usize, b: usize| {
            let s = |n| [lead, &[n]].concat();
            Case::new(Concat, [t(s(a).as_slice()), t(s(b).as_slice())])
        };
        let mut small = vec![
            cat(&[], 1, 1),
            cat(&[1], 3, 2),
            cat(&[2, 5, 7], 64, 32),
            cat(&[3, 4, 4], 4, 5),
            cat(&[1, 9], 1, 8),
            cat(&[2, 8, 8], 32, 32),
            cat(&[77], 5, 60),
            cat(&[1, 1, 1], 1280, 640),
        ];
        // The skips of SD 1.5; those of SDXL and of the LDM are as large or smaller.
        let real: [(usize, &[(usize, usize)]); 4] = [
            (8, &[(1280, 1280)]),
            (16, &[(1280, 1280), (1280, 640)]),
            (32, &[(1280, 640), (640, 640), (640, 320)]),
            (64, &[(640, 320), (320, 320)]),
        ];
        let at = |side| move |&(a, b): &(usize, usize)| cat(&[2, side, side], a, b).bench();
        small.extend(real.iter().flat_map(|&(side, pairs)| pairs.iter().map(at(side))));
        small
    }

    fn random(r: &mut Small) -> Case {
        let rows = r.below(40) + 1;
        Case::new(Concat, [t([rows, r.below(70) + 1]), t([rows, r.below(70) + 1])])
    }
}

/// x (…,C) to columns `start` … `start + len` of it, (…,len): a half of a concatenation.
#[derive(Clone, PartialEq, Debug)]
pub struct Slice {
    /// The first column.
    pub start: usize,
    /// How many.
    pub len: usize,
}

impl Operation for Slice {
    const NAME: &'static str = "slice";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let (start, end) = (self.start, self.start + self.len);
        let want = format!("x (…,C) of a float type, C ≥ {end}");
        let [x0] = args(Self::NAME, &want, x)?;
        let fits = !x0.shape.is_empty() && x0.shape.last() >= end && end > start;
        ensure!(fits && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![Spec::new(x0.dtype, x0.shape.with_last(self.len))])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let rows = x[0].data.chunks(x[0].shape.last());
        vec![Array {
            shape: x[0].shape.with_last(self.len),
            data: rows.flat_map(|row| row[self.start..][..self.len].to_vec()).collect(),
        }]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, c) = (io.slice(0), io.x[0].shape.last());
        io.rows(0, self.len, |first, y| {
            for (i, y) in y.chunks_mut(self.len).enumerate() {
                x.read((first + i) * c + self.start, y);
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (dtype, c) = (io.y_spec(0).dtype, io.x_spec(0).shape.last());
        let n = io.y_spec(0).shape.numel() / launch::at_once(dtype, &[self.len, c, self.start]);
        let (len, c, start) = (io.int(self.len)?, io.int(c)?, io.int(self.start)?);
        let p = part::ConcatSlice { y: io.y(0), x: io.x(0), n: io.int(n)?, len, c, start };
        io.launch(part::CONCAT_SLICE, dtype, "", [n.div_ceil(part::BLOCK), 1, 1], part::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, _x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(0, y, y)
    }

    fn cases() -> Vec<Case> {
        let slice = |x: &[usize], start, len| Case::new(Slice { start, len }, [t(x)]);
        vec![
            slice(&[1], 0, 1),
            slice(&[3], 2, 1),
            slice(&[2, 5], 0, 3),
            slice(&[2, 5, 7, 96], 64, 32),
            slice(&[3, 4, 4, 9], 4, 5),
            slice(&[77, 65], 5, 60),
            slice(&[2, 8, 8, 64], 0, 32),
            slice(&[1, 1, 1, 1920], 1280, 640),
            slice(&[2, 64, 64, 960], 320, 640).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        let (start, len) = (r.below(30), r.below(40) + 1);
        Case::new(Slice { start, len }, [t([r.below(40) + 1, start + len + r.below(9)])])
    }
}
