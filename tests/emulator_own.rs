//! The emulator's asynchronous copies, matrices, bank conflicts and sites, each on a kernel of `tests/emulator/own` whose
//! answer is known.

#[path = "emulator/harness.rs"]
mod harness;

use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use harness::{
    Bench, CUtensorMapDataType, Memory, Step, allow_shared, allowed_shared, attribute, kernel, kernel_of,
    launch, launch_shared, stream, tensor_map,
};

const SCHEDULES: [&str; 4] = [
    "order=forward;async=late",
    "order=reverse;async=early",
    "order=random:1;async=random:1",
    "order=reverse;async=late",
];

#[repr(C)]
struct Params {
    y: u64,
    x: u64,
    n: i32,
}

#[test]
fn matrices_are_multiplied_as_documented() {
    let Some(bench) = Bench::new("matrices_are_multiplied_as_documented") else { return };
    #[repr(C)]
    struct Matrices {
        d: u64,
        zeroed: u64,
        before: u64,
        a: u64,
        b: u64,
        c: u64,
        x: u64,
        counter: u64,
    }
    const SMEM_BYTES: u32 = 131_072;
    let stream = stream();
    // Exact in both types; a subnormal of f16 and an overflow are among them.
    let value = |i: usize| ((i * 37 % 61) as f32 - 30.0) / 8.0;
    let mut a: Vec<f32> = (0..256).map(value).collect();
    let b: Vec<f32> = (0..128).map(|i| value(i * i + 3)).collect();
    let mut c: Vec<f32> = (0..128).map(|i| value(i + 7) * 100.0).collect();
    a[5] = 2f32.powi(-24);
    c[127] = f32::INFINITY;
    let x: Vec<f32> = (0..128).map(|i| i as f32 + 1.0).collect();
    for dtype in ["f16", "bf16"] {
        for schedule in SCHEDULES {
            bench.emulator.configure(schedule);
            let given: Vec<Memory> = [&a, &b, &c, &x].map(|v| Memory::with(v, stream).unwrap()).into();
            let (d, zeroed) = (Memory::new(4 * 3 * 128).unwrap(), Memory::new(4 * 128).unwrap());
            let (before, counter) = (Memory::new(128).unwrap(), Memory::with(&[0.0], stream).unwrap());
            let p = Matrices {
                d: d.0,
                zeroed: zeroed.0,
                before: before.0,
                a: given[0].0,
                b: given[1].0,
                c: given[2].0,
                x: given[3].0,
                counter: counter.0,
            };
            let function = kernel_of("matrices", dtype, "").unwrap();
            allow_shared(function, SMEM_BYTES as i32).unwrap();
            launch_shared(function, [1; 3], 32, SMEM_BYTES, stream, p).unwrap();
            let got = d.read(3 * 128, stream).unwrap();
            for (i, got) in got.iter().enumerate() {
                let (row, column) = (i % 128 / 8, i % 8);
                let products = (0..16).map(|k| f64::from(a[16 * row + k]) * f64::from(b[8 * k + column]));
                let want = (f64::from(c[i % 128]) + products.sum::<f64>()) as f32;
                assert_eq!(*got, want, "{dtype}, way {}, row {row}, column {column}", i / 128);
            }
            let zeroed = zeroed.read(128, stream).unwrap();
            let want: Vec<f32> = (0..128).map(|i| if i / 4 % 2 == 0 { x[i] } else { 0.0 }).collect();
            assert_eq!(zeroed, want);
            let mut seen = before.read(32, stream).unwrap();
            seen.sort_by(f32::total_cmp);
            let mut want: Vec<f32> = (0..32).map(|i| (i % 5) as f32).collect();
            want.sort_by(f32::total_cmp);
            assert_eq!(seen, want);
            assert_eq!(counter.read(1, stream).unwrap()[0].to_bits(), 32 % 5);
        }
    }
    assert_eq!(bench.emulator.report(), "");
}

/// Runs each way of a kernel, of which 0 is right, in both types under all schedules, and looks for what is wrong with it, in words of the
/// report; empty where only the values betray it. `overwritten` is the way that comes too late to spoil what is done at once.
fn every_way(
    bench: &Bench,
    says: &[&str],
    overwritten: usize,
    want: &[f32],
    run: impl Fn(&str, usize) -> Step<Vec<f32>>,
) {
    for dtype in ["f16", "bf16"] {
        for (way, says) in says.iter().enumerate() {
            let mut right = 0;
            for schedule in SCHEDULES {
                bench.emulator.configure(schedule);
                let got = run(dtype, way);
                let report = bench.emulator.report();
                bench.emulator.reset();
                let same = got.as_deref() == Ok(want);
                right += usize::from(same);
                match *says {
                    "" if way == 0 => assert!(same && report.is_empty(), "{dtype}, {schedule}: {report}"),
                    "" => {}
                    says => assert!(got.is_err() && report.contains(says), "way {way}, {schedule}: {report}"),
                }
            }
            // Read too early, they are never there; overwritten too early, they are where products are done at once.
            let all = if way == 0 { SCHEDULES.len() } else { 0 };
            assert!(right == all || way == overwritten && right < SCHEDULES.len(), "way {way}: {right}");
        }
    }
    assert_eq!(bench.emulator.report(), "");
}

#[test]
fn warpgroups_multiply_as_documented_and_what_they_lack_is_reported() {
    let Some(bench) = Bench::new("warpgroups_multiply_as_documented_and_what_they_lack_is_reported") else {
        return;
    };
    #[repr(C)]
    struct Warpgroup {
        d: u64,
        rows: u64,
        c: u64,
    }
    const M: usize = 64;
    const N: usize = 80;
    const K: usize = 64;
    const WAYS: [&str; 13] = [
        "",
        "no fence_proxy_async since",
        "met no barrier since its fence_proxy_async",
        "without a wgmma_fence",
        "has not waited for 4 of its wgmma",
        "has not waited for 4 of its wgmma",
        "",
        "",
        "diverged warpgroup: thread",
        "were written while another wgmma was in flight",
        "want a multiple of 1024",
        "diverged warpgroup",
        "has not waited for its copy",
    ];
    let stream = stream();
    let row = |i: usize, k: usize| ((i * 37 + k * k * 11) % 61) as f32 / 8.0 - 4.0;
    let c: Vec<f32> = (0..M * N).map(|i| (i % 97) as f32 * 100.0).collect();
    let want: Vec<f32> =
        (0..M * N).map(|i| c[i] + (0..K).map(|k| row(i / N, k) * row(M + i % N, k)).sum::<f32>()).collect();
    every_way(&bench, &WAYS, 7, &want, |dtype, way| {
        let rows = packed(dtype, (M + N) * K, |i| row(i / K, i % K));
        let [rows, c] = [&rows, &c].map(|x| Memory::with(x, stream).unwrap());
        let d = Memory::new(4 * M * N).unwrap();
        let p = Warpgroup { d: d.0, rows: rows.0, c: c.0 };
        let function = kernel_of("warpgroup", dtype, &format!("WAY={way}")).unwrap();
        launch(function, 1, 128, stream, p).and_then(|()| d.read(M * N, stream))
    });
}

#[test]
fn a_left_operand_in_registers_is_multiplied_with_rows() {
    let Some(bench) = Bench::new("a_left_operand_in_registers_is_multiplied_with_rows") else { return };
    #[repr(C)]
    struct WarpgroupRows {
        d: u64,
        a: u64,
        b: u64,
        c: u64,
    }
    const M: usize = 64;
    const N: usize = 80;
    const K: usize = 64;
    const WAYS: [&str; 8] = [
        "",
        "want a multiple of 1024",
        "no fence_proxy_async since",
        "has not waited for 4 of its wgmma",
        "diverged warpgroup: thread",
        "",
        "outside the block's",
        "without a wgmma_fence",
    ];
    let stream = stream();
    let a = |i: usize, k: usize| ((i * 37 + k * k * 11) % 61) as f32 / 8.0 - 4.0;
    let b = |k: usize, n: usize| ((k * 13 + n * n * 7) % 59) as f32 / 8.0 - 3.5;
    let c: Vec<f32> = (0..M * N).map(|i| (i % 97) as f32 * 100.0).collect();
    let sum = |i: usize| (0..K).map(|k| a(i / N, k) * b(k, i % N)).sum::<f32>();
    let want: Vec<f32> = (0..M * N).map(|i| c[i] + sum(i)).collect();
    every_way(&bench, &WAYS, 5, &want, |dtype, way| {
        let left = packed(dtype, M * K, |i| a(i / K, i % K));
        let right = packed(dtype, K * N, |i| b(i / N, i % N));
        let [a, b, c] = [&left, &right, &c].map(|x| Memory::with(x, stream).unwrap());
        let d = Memory::new(4 * M * N).unwrap();
        let p = WarpgroupRows { d: d.0, a: a.0, b: b.0, c: c.0 };
        let function = kernel_of("warpgroup_rows", dtype, &format!("WAY={way}")).unwrap();
        launch(function, 1, 128, stream, p).and_then(|()| d.read(M * N, stream))
    });
}

/// A tensor of 16-bit elements: two in each word.
fn packed(dtype: &str, n: usize, value: impl Fn(usize) -> f32) -> Vec<f32> {
    let bits = |v: f32| match dtype {
        "f16" => half::f16::from_f32(v).to_bits(),
        _ => half::bf16::from_f32(v).to_bits(),
    };
    let word = |i: usize| u32::from(bits(value(2 * i))) | u32::from(bits(value(2 * i + 1))) << 16;
    (0..n / 2).map(|i| f32::from_bits(word(i))).collect()
}

#[test]
fn boxes_of_tensors_are_copied_as_documented_and_what_they_lack_is_reported() {
    let Some(bench) = Bench::new("boxes_of_tensors_are_copied_as_documented_and_what_they_lack_is_reported")
    else {
        return;
    };
    #[repr(C)]
    struct Tensor {
        x: cudarc::driver::sys::CUtensorMap,
        w: cudarc::driver::sys::CUtensorMap,
        d: u64,
    }
    const N: usize = 16;
    const C: usize = 72;
    const SIDE: usize = 8;
    // What is wrong with each way, in words of the reports; empty where only the values betray it.
    const WAYS: [&[&str]; 9] = [
        &[],
        &["was by itself at an mbarrier"],
        &["which a wgmma in flight reads", "deadlock", "has not waited for its phase"],
        &["waits in mbarrier_wait of line", "8 of 8 arrivals"],
        &["more than mbarrier_expect has said", "has not waited for its phase"],
        &["has not waited for its phase", "deadlock"],
        &["has been met in"],
        &["more than 8 arrivals", "deadlock", "in flight reads", "has not waited for its phase"],
        &["outside the block's"],
    ];
    let stream = stream();
    let x = |i: usize| (i * 37 % 13) as f32 / 4.0 - 1.5;
    let w = |i: usize| (i * i * 11 % 17) as f32 / 8.0 - 1.0;
    let mut want = vec![0.0f32; 2 * SIDE * SIDE * N];
    for (i, sum) in want.iter_mut().enumerate() {
        let (pixel, o) = (i / N, i % N);
        let (image, row, column) = (pixel / SIDE / SIDE, pixel / SIDE % SIDE, pixel % SIDE);
        for tap in 0..9 {
            let (h, v) = ((row + tap / 3).wrapping_sub(1), (column + tap % 3).wrapping_sub(1));
            if h < SIDE && v < SIDE {
                let (x0, w0) = (((image * SIDE + h) * SIDE + v) * C, (o * 9 + tap) * C);
                *sum += (0..C).map(|c| x(x0 + c) * w(w0 + c)).sum::<f32>();
            }
        }
    }
    let c = C as u64;
    for (dtype, kind) in [
        ("f16", CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
        ("bf16", CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
    ] {
        let (x, w) = (packed(dtype, 2 * SIDE * SIDE * C, x), packed(dtype, N * 9 * C, w));
        for (way, says) in WAYS.into_iter().enumerate() {
            let mut right = 0;
            for schedule in SCHEDULES {
                bench.emulator.configure(schedule);
                let (x, w) = (Memory::with(&x, stream).unwrap(), Memory::with(&w, stream).unwrap());
                let d = Memory::new(4 * want.len()).unwrap();
                let p = Tensor {
                    x: tensor_map(kind, x.0, [c, 8, 8, 2], [2 * c, 16 * c, 128 * c], [64, 8, 8, 2]).unwrap(),
                    w: tensor_map(kind, w.0, [c, 9, 16, 1], [2 * c, 18 * c, 288 * c], [64, 1, 16, 1])
                        .unwrap(),
                    d: d.0,
                };
                let function = kernel_of("tensor", dtype, &format!("WAY={way}")).unwrap();
                let got = launch(function, 1, 256, stream, p).and_then(|()| d.read(want.len(), stream));
                let report = bench.emulator.report();
                bench.emulator.reset();
                right += usize::from(got.as_ref() == Ok(&want));
                if got.is_err() {
                    assert!(says.iter().any(|text| report.contains(text)), "way {way}, {schedule}: {report}");
                } else {
                    assert_eq!(report, "", "way {way}, {schedule}");
                }
            }
            assert!(if way == 0 { right == 4 } else { right < 4 }, "{dtype}: way {way}: {right}");
        }
        // What a tensor does not hold may not be read, whatever its map says.
        bench.emulator.configure(SCHEDULES[0]);
        let (x, w) = (Memory::with(&x, stream).unwrap(), Memory::with(&w, stream).unwrap());
        let d = Memory::new(4 * want.len()).unwrap();
        let map = |at, images| {
            tensor_map(kind, at, [c, 8, 8, images], [2 * c, 16 * c, 128 * c], [64, 8, 8, 2]).unwrap()
        };
        let tap = tensor_map(kind, w.0, [c, 9, 16, 1], [2 * c, 18 * c, 288 * c], [64, 1, 16, 1]).unwrap();
        let p = Tensor { x: map(x.0 + 128 * c, 2), w: tap, d: d.0 };
        let function = kernel_of("tensor", dtype, "WAY=0").unwrap();
        let got = launch(function, 1, 256, stream, p).and_then(|()| d.read(want.len(), stream));
        assert_eq!(got, Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        assert!(bench.emulator.report().contains("out of bounds"), "{}", bench.emulator.report());
        bench.emulator.reset();
    }
}

#[test]
fn a_map_is_refused_that_a_driver_refuses() {
    let Some(bench) = Bench::new("a_map_is_refused_that_a_driver_refuses") else { return };
    let half = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    let x = Memory::new(4096).unwrap();
    let (extents, strides, part) = ([64, 4, 4, 2], [128, 512, 2048], [64, 4, 4, 1]);
    tensor_map(half, x.0, extents, strides, part).unwrap();
    for (offset, extents, strides, part, says) in [
        (8, extents, strides, part, "a multiple of 16"),
        (0, [0, 4, 4, 2], strides, part, "axis 0 has an extent of 0"),
        (0, [64, 4, (1 << 32) + 1, 2], strides, part, "axis 2 has an extent of 4294967297"),
        (0, extents, [128, 520, 2048], part, "axis 2 has a stride of 520 bytes"),
        (0, extents, [128, 512, 1 << 40], part, "axis 3 has a stride of 1099511627776 bytes"),
        (0, extents, strides, [64, 257, 1, 1], "axis 1 of the box: 257"),
        (0, extents, strides, [64, 4, 0, 1], "axis 2 of the box: 0"),
        (0, extents, strides, [72, 4, 4, 1], "rows of 144 bytes in a swizzle of 128"),
        (0, extents, strides, [60, 4, 4, 1], "rows of 120 bytes in the box: want a multiple of 16"),
    ] {
        let got = tensor_map(half, x.0 + offset, extents, strides, part);
        assert_eq!(got.err(), Some(CUresult::CUDA_ERROR_INVALID_VALUE), "{says}");
        assert!(bench.emulator.report().contains(says), "want `{says}`: {}", bench.emulator.report());
        bench.emulator.reset();
    }
}

#[test]
fn dynamic_shared_memory_must_be_allowed() {
    let Some(bench) = Bench::new("dynamic_shared_memory_must_be_allowed") else { return };
    use CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK as STATIC,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST,
    };
    let (stream, most) = (stream(), attribute(MOST));
    assert_eq!((attribute(STATIC), most), (49152, 232_448));
    let function = kernel("dynamic_size", "BAD=0").unwrap();
    let x = Memory::with(&[1.0; 256], stream).unwrap();
    let y = Memory::new(1024).unwrap();
    let attempt =
        |shared| launch_shared(function, [1; 3], 256, shared, stream, Params { y: y.0, x: x.0, n: 256 });
    assert_eq!(allowed_shared(function), 49152);
    assert_eq!(attempt(65536), Err(CUresult::CUDA_ERROR_INVALID_VALUE));
    assert!(bench.emulator.report().contains("allowed 49152"), "{}", bench.emulator.report());
    assert_eq!(allow_shared(function, most + 1), Err(CUresult::CUDA_ERROR_INVALID_VALUE));
    allow_shared(function, most).unwrap();
    assert_eq!(allowed_shared(function), most);
    attempt(65536).unwrap();
    assert_eq!(y.read(256, stream).unwrap(), [1.0; 256]);
}

#[test]
fn bank_conflicts_are_counted_by_line() {
    let Some(bench) = Bench::new("bank_conflicts_are_counted_by_line") else { return };
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/own/banks.cu");
    let source = std::fs::read_to_string(path).unwrap();
    let access = |line: &str| {
        ["load_shared", "store_shared", "cp_async(", "ldmatrix"].into_iter().find(|name| line.contains(name))
    };
    let mut want = Vec::new();
    for (i, line) in source.lines().enumerate() {
        let (Some(access), Some((_, numbers))) = (access(line), line.split_once("// ")) else { continue };
        let numbers: Vec<u64> = numbers.split(' ').map_while(|n| n.parse().ok()).collect();
        let [ideal, actual] = numbers[..] else { continue };
        // A block of two warps.
        want.push((i as u32 + 1, access.trim_end_matches('(').to_string(), 2, 2 * ideal, 2 * actual));
    }
    assert!(want.len() >= 20, "{want:?}");
    let stream = stream();
    let function = kernel("banks", "").unwrap();
    for (schedule, counts) in SCHEDULES.iter().flat_map(|s| [(s, "count"), (s, "off")]) {
        bench.emulator.reset();
        bench.emulator.configure(&format!("{schedule};banks={counts}"));
        let x = Memory::with(&[1.0; 256], stream).unwrap();
        let y = Memory::new(256).unwrap();
        launch(function, 1, 64, stream, Params { y: y.0, x: x.0, n: 256 }).unwrap();
        y.read(64, stream).unwrap();
        let rows = bench.emulator.banks();
        assert!(rows.iter().all(|row| row.unit == "banks.f32.base"), "{rows:?}");
        let got: Vec<_> = rows.into_iter().map(|r| (r.line, r.access, r.count, r.ideal, r.actual)).collect();
        assert_eq!(got, if counts == "count" { want.clone() } else { vec![] }, "{schedule}");
    }
    bench.emulator.configure("banks=off");
    assert_eq!(bench.emulator.report(), "");
}

#[test]
fn a_dropped_site_is_noticed_where_it_is_needed() {
    let Some(bench) = Bench::new("a_dropped_site_is_noticed_where_it_is_needed") else { return };
    let stream = stream();
    let x: Vec<f32> = (0..256).map(|i| 1.0 + (i * 37 % 101) as f32).collect();
    let want: Vec<f32> = (0..256)
        .map(|i| (0..8).map(|k| (k + 1) as f32 * x[(i / 64 + k) % 4 * 64 + 63 - i % 64]).sum())
        .collect();
    let attempt = |variant: &str| {
        let (input, y) = (Memory::with(&x, stream)?, Memory::new(1024)?);
        let launched =
            launch(kernel("pipeline", variant)?, 4, 64, stream, Params { y: y.0, x: input.0, n: 256 });
        let result = launched.and_then(|()| y.read(256, stream));
        bench.emulator.reset();
        result
    };
    // The sites of a variant, and those that no schedule misses.
    let survivors = |variant: &str| {
        bench.emulator.configure("drop=none;order=forward;async=late");
        let input = Memory::with(&x, stream).unwrap();
        let y = Memory::new(1024).unwrap();
        launch(kernel("pipeline", variant).unwrap(), 4, 64, stream, Params { y: y.0, x: input.0, n: 256 })
            .unwrap();
        assert_eq!(y.read(256, stream).unwrap(), want);
        let mut sites = bench.emulator.sites();
        sites.retain(|site| site.contains(":pipeline:"));
        let all = sites.len();
        sites.retain(|site| {
            SCHEDULES.iter().all(|schedule| {
                bench.emulator.configure(&format!("{schedule};drop={site}"));
                attempt(variant) == Ok(want.clone())
            })
        });
        bench.emulator.configure("drop=none");
        (all, sites)
    };
    let (all, missed) = survivors("EXTRA=0");
    assert_eq!((all, missed), (3, vec![]));
    let (all, missed) = survivors("EXTRA=1");
    assert_eq!(all, 4);
    let source = include_str!("emulator/own/pipeline.cu");
    let extra = source.lines().position(|line| line == "#if EXTRA").unwrap() + 2;
    assert_eq!(missed, [format!("sync_block:pipeline:{extra}")]);
}

#[test]
fn what_another_block_wrote_needs_a_fence_and_an_atomic_operation() {
    let Some(bench) = Bench::new("what_another_block_wrote_needs_a_fence_and_an_atomic_operation") else {
        return;
    };
    #[repr(C)]
    struct LastBlock {
        y: u64,
        parts: u64,
        x: u64,
        counter: u64,
    }
    let stream = stream();
    let values: Vec<f32> = (0..256).map(|i| (i * 37 % 101) as f32).collect();
    let want: Vec<f32> = (0..64).map(|t| (0..4).map(|b| values[64 * b + t]).sum()).collect();
    for (way, schedule) in (0..6).flat_map(|way| SCHEDULES.map(|schedule| (way, schedule))) {
        for threads in [1, 2] {
            bench.emulator.configure(&format!("{schedule};threads={threads}"));
            let (x, counter) =
                (Memory::with(&values, stream).unwrap(), Memory::with(&[0.0], stream).unwrap());
            let (y, parts) = (Memory::new(256).unwrap(), Memory::new(1024).unwrap());
            let p = LastBlock { y: y.0, parts: parts.0, x: x.0, counter: counter.0 };
            let function = kernel("last_block", &format!("WAY={way}")).unwrap();
            let got = launch(function, 4, 64, stream, p).and_then(|()| y.read(64, stream));
            let report = bench.emulator.report();
            if way < 2 {
                assert_eq!(got.as_ref(), Ok(&want), "way {way}, {schedule}: {report}");
                // The next launch may read all of it.
                assert_eq!(parts.read(256, stream).unwrap(), values);
            } else {
                assert_eq!(got, Err(CUresult::CUDA_ERROR_ASSERT), "way {way}, {schedule}");
                // Where blocks run side by side, the one that wrote may not be over.
                let says = match (way, threads) {
                    (5, _) => "the reader lacks a fence",
                    (_, 1) => "without a fence",
                    _ => "written",
                };
                assert!(report.contains(says), "way {way}, {schedule}: {report}");
            }
            bench.emulator.reset();
        }
    }
}
