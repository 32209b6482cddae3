//! y[b,t] = table[ids[b,t]] + positions[t]: token and position embeddings of the text encoders.
//!
//! PyTorch: `F.embedding(ids, table) + positions`. Kernel: `kernels/embedding.cu`.
use super::prelude::*;
use crate::kernels::embedding as k;
use crate::kernels::embedding_grad as back;

/// ids (B,T) i32, table (V,C)\[, positions (P,C) with P ≥ T\] to (B,T,C); without positions ids of any shape (…) to (…,C).
#[derive(Clone, PartialEq, Debug)]
pub struct Embedding {
    /// Whether positions are given.
    pub positions: bool,
}

impl Operation for Embedding {
    const NAME: &'static str = "embedding";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "ids (…) of i32, table (V,C)[, ids (B,T) and positions (P,C), P ≥ T] of one float type";
        ensure!(x.len() == 2 + self.positions as usize, Self::NAME, want, x);
        let (ids, table) = (x[0], x[1]);
        let fits = ids.dtype == DType::I32
            && (ids.shape.len() == 2 || !self.positions)
            && table.shape.len() == 2
            && DType::FLOATS.contains(&table.dtype)
            && x.get(2).is_none_or(|p| {
                p.dtype == table.dtype
                    && p.shape.len() == 2
                    && p.shape[1] == table.shape[1]
                    && p.shape[0] >= ids.shape[1]
            });
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![Spec::new(table.dtype, [&ids.shape[..], &table.shape[1..]].concat().as_slice())])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let shape = Shape::from([&x[0].shape[..], &x[1].shape[1..]].concat().as_slice());
        vec![Array::from_fn(shape, |i| {
            let (lead, c) = (&i[..i.len() - 1], i[i.len() - 1]);
            let id = x[0].at(lead) as usize;
            x[1].at(&[id, c]) + if self.positions { x[2].at(&[lead[1], c]) } else { 0.0 }
        })]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        let mut x = x.to_vec();
        x[1..].iter_mut().for_each(|a| *a = a.map(f64::abs));
        self.spec(&x)
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (ids, table) = (io.i32(0), io.slice(1));
        let positions = self.positions.then(|| io.slice(2));
        let (tokens, v, c) = (io.x[0].shape.last(), io.x[1].shape[0], io.x[1].shape[1]);
        if let Some(bad) = ids.iter().find(|&&id| id < 0 || id as usize >= v) {
            return Err(Error::invalid(format!("embedding: want ids from 0 to {}; got {bad}", v - 1)));
        }
        io.rows(0, c, |first, y| {
            for (i, row) in y.chunks_mut(c).enumerate() {
                table.read(ids[first + i] as usize * c, row);
                if let Some(p) = positions {
                    let at = (first + i) % tokens * c;
                    p.with(at..at + c, |p| row.iter_mut().zip(p).for_each(|(y, p)| *y += p));
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let ids = io.x_spec(0).shape;
        let p = k::EmbeddingFwd {
            y: io.y(0),
            ids: io.x(0),
            table: io.x(1),
            positions: if self.positions { io.x(2) } else { Default::default() },
            tokens: io.int(ids.last())?,
            v: io.int(io.x_spec(1).shape[0])?,
            c: io.int(io.y_spec(0).shape.last())?,
        };
        io.launch(k::EMBEDDING_FWD, io.y_spec(0).dtype, "", [ids.numel(), 1, 1], k::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let moved = y[0].bytes() * (2 + self.positions as usize) + x[0].bytes();
        Cost { flops: y[0].shape.numel() as f64, bytes: moved as f64 }
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None; x.len()]) };
        let rows = |v: &Var| g.shape(*v)[0];
        let op = EmbeddingGrad { rows: rows(&x[1]), positions: x.get(2).map_or(0, rows) };
        let tables = g.push_all("tables", op, &[x[0], *dy])?;
        Ok([None].into_iter().chain(tables.into_iter().map(Some)).collect())
    }

    fn cases() -> Vec<Case> {
        let embed = |b, tokens, v, c, p: usize| {
            let mut args = vec![ids([b, tokens], v), t([v, c])];
            args.extend((p > 0).then(|| t([p, c])));
            Case::new(Embedding { positions: p > 0 }, args)
        };
        vec![
            embed(1, 1, 1, 1, 0),
            embed(1, 1, 2, 3, 1),
            embed(2, 77, 1000, 32, 77),
            embed(3, 5, 10, 130, 9),
            embed(1, 9, 64, 257, 0),
            embed(2, 3, 7, 8, 3),
            embed(4, 1, 100, 16, 0),
            Case::new(Embedding { positions: false }, [ids([2, 5, 3], 40), t([40, 3])]),
            Case::new(Embedding { positions: false }, [ids([9], 4), t([4, 17])]),
            embed(1, 77, 500, 48, 77),
            embed(2, 77, 49408, 768, 77).weights(1..3).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        let (tokens, v, c) = (r.below(20) + 1, r.below(50) + 1, r.below(140) + 1);
        let mut args = vec![ids([r.below(3) + 1, tokens], v), t([v, c])];
        let positions = r.below(2) == 0;
        args.extend(positions.then(|| t([tokens + r.below(5), c])));
        Case::new(Embedding { positions }, args)
    }
}

/// ids (B,T) i32, dy (B,T,C) to the gradients of the tables, f32: (V,C)\[, positions (P,C)\]; without positions ids (…), dy (…,C).
#[derive(Clone, PartialEq, Debug)]
pub struct EmbeddingGrad {
    /// V.
    pub rows: usize,
    /// P, or 0 where there are no positions.
    pub positions: usize,
}

impl Operation for EmbeddingGrad {
    const NAME: &'static str = "embedding_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!(
            "ids (…) of i32, dy (…,C) of a float type; with positions ids (B,T), T ≤ {}",
            self.positions
        );
        let [ids, dy] = args(Self::NAME, &want, x)?;
        let fits = ids.dtype == DType::I32
            && !dy.shape.is_empty()
            && dy.shape[..dy.shape.len() - 1] == ids.shape[..]
            && DType::FLOATS.contains(&dy.dtype)
            && (self.positions == 0 || ids.shape.len() == 2 && ids.shape[1] <= self.positions);
        ensure!(fits, Self::NAME, want, x);
        let table = |rows| Spec::new(DType::F32, [rows, dy.shape.last()]);
        Ok([self.rows, self.positions].into_iter().filter(|&n| n > 0).map(table).collect())
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (tokens, c) = (x[0].shape.last(), x[1].shape.last());
        let mut tables = vec![Array::zeros([self.rows, c])];
        tables.extend((self.positions > 0).then(|| Array::zeros([self.positions, c])));
        for (i, (id, dy)) in x[0].data.iter().zip(x[1].data.chunks(c)).enumerate() {
            for (table, row) in tables.iter_mut().zip([*id as usize, i % tokens]) {
                table.data[row * c..][..c].iter_mut().zip(dy).for_each(|(y, d)| *y += d);
            }
        }
        tables
    }

    /// |dy| in place of dy; ids stay.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.spec(&[x[0].clone(), x[1].map(f64::abs)])
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (ids, dy) = (io.i32(0), io.slice(1));
        let (tokens, c) = (io.x[0].shape.last(), io.x[1].shape.last());
        if let Some(bad) = ids.iter().find(|&&id| id < 0 || id as usize >= self.rows) {
            return Err(Error::invalid(format!(
                "embedding: want ids from 0 to {}; got {bad}",
                self.rows - 1
            )));
        }
        for (j, row) in [(0, None), (1, Some(tokens))].into_iter().take(io.y.len()) {
            io.write(j, |table| {
                table.fill(0.0);
                for (i, &id) in ids.iter().enumerate() {
                    let row = row.map_or(id as usize, |tokens| i % tokens);
                    dy.with(i * c..(i + 1) * c, |dy| {
                        table[row * c..][..c].iter_mut().zip(dy).for_each(|(y, d)| *y += d);
                    });
                }
            });
        }
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let dy = *io.x_spec(1);
        let (n, columns) = (io.int(dy.shape.rows())?, io.int(dy.shape.last())?);
        let p = back::EmbeddingGrad { table: io.y(0), ids: io.x(0), dy: io.x(1), tokens: n, c: columns };
        io.launch(back::EMBEDDING_GRAD, dy.dtype, "", [self.rows, 1, 1], back::BLOCK, p)?;
        if self.positions == 0 {
            return Ok(());
        }
        let (batch, tokens) = (io.int(dy.shape[0])?, io.int(dy.shape[1])?);
        let p = back::PositionsGrad { positions: io.y(1), dy: io.x(1), batch, tokens, c: columns };
        io.launch(back::POSITIONS_GRAD, dy.dtype, "", [self.positions, 1, 1], back::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(y.len() * x[1].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        Embedding::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(Embedding::random(r))
    }
}

/// The case of the gradients for one of the op.
fn with_gradient(case: Case) -> Case {
    let (ids, table) = (case.args[0].clone(), case.args[1].shape);
    let positions = case.args.get(2).map_or(0, |p| p.shape[0]);
    let dy = t([&ids.shape[..], &table[1..]].concat().as_slice());
    Case {
        op: EmbeddingGrad { rows: table[0], positions }.into(),
        args: vec![ids, dy],
        weights: 0..0,
        ..case
    }
}
