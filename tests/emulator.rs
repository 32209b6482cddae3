//! The test of the test: every wrong kernel of `tests/emulator/bad` must be reported, every right twin must pass, in all
//! orders of threads and of stream operations; and the same for what the host may do wrong.
#![allow(unsafe_code)]

#[path = "emulator/harness.rs"]
mod harness;

#[path = "emulator/cases.rs"]
mod cases;

use cases::{CASES, Case, case};
use cudarc::driver::sys::{self, CUresult};
use harness::{
    Bench, Memory, Pinned, Step, allow_shared, kernel, kernel_of, launch, launch_3d, launch_programmatic,
    launch_shared, ok, stream, tensor_map,
};

const CONFIGURATIONS: [&str; 6] = [
    "order=forward;async=late",
    "order=reverse;async=early",
    "order=random:1;async=random:1",
    "order=random:2;async=random:2",
    "order=forward;async=random:3",
    "order=reverse;async=late",
];

#[repr(C)]
struct Params {
    y: u64,
    x: u64,
    n: i32,
}

/// With a map of x as rows of 32 elements, in boxes of 64 rows.
#[repr(C)]
struct Mapped {
    map: sys::CUtensorMap,
    rest: Params,
}

fn inputs(n: usize) -> Vec<f32> {
    (0..n).map(|i| 1.0 + (i * 37 % 101) as f32).collect()
}

fn run(stem: &'static str, variant: &str, n: usize, per_thread: usize) -> Step<Vec<f32>> {
    run_case(&case(stem, n, per_thread, "", |_, _| 0.0), variant)
}

/// One run of a kernel as an engine would do it: upload, launch, download, synchronise.
fn run_case(case: &Case, variant: &str) -> Step<Vec<f32>> {
    let &Case { stem, n, per_thread, shared, programmatic, mapped, .. } = case;
    let stream = stream();
    let mut held = Vec::new();
    let result = (|| {
        held.push(Memory::with(&inputs(n), stream)?);
        held.push(Memory::new(4 * n)?);
        let params = || Params { y: held[1].0, x: held[0].0, n: n as i32 };
        let (function, blocks) = (kernel(stem, variant)?, n.div_ceil(256 * per_thread) as u32);
        allow_shared(function, shared as i32)?;
        if programmatic {
            launch(kernel(stem, "BAD=0")?, blocks as usize, 256, stream, params())?;
            launch_programmatic(function, blocks, 256, stream, params())?;
        } else if mapped {
            let float = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
            let map = tensor_map(float, held[0].0, [32, n as u64 / 32, 1, 1], [128; 3], [32, 64, 1, 1])?;
            let params = Mapped { map, rest: params() };
            launch_shared(function, [blocks, 1, 1], 256, shared, stream, params)?;
        } else {
            launch_shared(function, [blocks, 1, 1], 256, shared, stream, params())?;
        }
        held[1].read(n, stream)
    })();
    // What is queued must be over before its memory is freed, on the way of an error too.
    let _ = unsafe { sys::cuStreamSynchronize(stream) };
    drop(held);
    let _ = unsafe { sys::cuStreamDestroy_v2(stream) };
    result
}

#[test]
fn every_case_is_listed() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/bad");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "cu") {
            continue;
        }
        let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
        assert!(CASES.iter().any(|case| case.stem == stem), "{stem}.cu is in no case of tests/emulator.rs");
    }
}

#[test]
fn right_kernels_pass_in_every_order() {
    let Some(bench) = Bench::new("right_kernels_pass_in_every_order") else { return };
    for case in CASES {
        let x = inputs(case.n);
        for configuration in CONFIGURATIONS {
            for threads in [1, 2] {
                bench.emulator.configure(&format!("{configuration};threads={threads}"));
                let got = run_case(case, "BAD=0");
                let got = got.unwrap_or_else(|e| {
                    panic!("{} ({configuration}): {e:?}: {}", case.stem, bench.emulator.report())
                });
                for (i, y) in got.iter().enumerate() {
                    let want = (case.want)(&x, i);
                    let close = (y - want).abs() <= 1e-5 * want.abs();
                    assert!(close, "{} ({configuration}): y[{i}]: want {want}, got {y}", case.stem);
                }
            }
        }
    }
    assert_eq!(bench.emulator.report(), "");
}

#[test]
fn wrong_kernels_are_caught() {
    let Some(bench) = Bench::new("wrong_kernels_are_caught") else { return };
    for case in CASES {
        let mut outputs: Vec<Vec<u32>> = Vec::new();
        let (mut said, mut poisoned) = (Vec::new(), false);
        for configuration in CONFIGURATIONS {
            bench.emulator.configure(&format!("{configuration};threads=1"));
            match run_case(case, "BAD=1") {
                Ok(y) => {
                    poisoned |= y.iter().any(|v| v.is_nan());
                    outputs.push(y.iter().map(|v| v.to_bits()).collect());
                }
                Err(_) => said.push(bench.emulator.report()),
            }
            bench.emulator.reset();
        }
        let differ = outputs.iter().any(|y| *y != outputs[0]);
        assert!(!said.is_empty() || poisoned || differ, "{}: the wrong kernel passed", case.stem);
        if !case.says.is_empty() {
            assert!(!said.is_empty(), "{}: no configuration reported it", case.stem);
            for text in &said {
                assert!(
                    text.contains(case.says),
                    "{}: want `{}` in the report: {text}",
                    case.stem,
                    case.says
                );
                assert!(text.contains(case.stem) && text.contains("thread"), "{}: who? {text}", case.stem);
            }
        }
    }
}

#[test]
fn a_violation_is_sticky_and_names_the_line() {
    let Some(bench) = Bench::new("a_violation_is_sticky_and_names_the_line") else { return };
    assert_eq!(run("unchecked_tail", "BAD=1", 1000, 1), Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
    let report = bench.emulator.report();
    for part in ["kernel unchecked_tail", "block (3,0,0)", "thread 232", "unchecked_tail.cu:16", "4000 bytes"]
    {
        assert!(report.contains(part), "want `{part}` in: {report}");
    }
    assert_eq!(Memory::new(16).err(), Some(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
    assert_eq!(unsafe { sys::cuCtxSynchronize() }, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    bench.emulator.reset();
    assert!(run("unchecked_tail", "BAD=0", 1000, 1).is_ok());
    assert_eq!(run("misaligned_load", "BAD=1", 1000, 4), Err(CUresult::CUDA_ERROR_MISALIGNED_ADDRESS));
    bench.emulator.reset();
    assert_eq!(run("early_exit", "BAD=1", 1000, 1), Err(CUresult::CUDA_ERROR_LAUNCH_FAILED));
    bench.emulator.reset();
    assert_eq!(run("reads_output", "BAD=1", 1000, 1), Err(CUresult::CUDA_ERROR_ASSERT));
    bench.emulator.reset();
    bench.emulator.configure("uninit=ignore");
    assert!(run("reads_output", "BAD=1", 1000, 1).unwrap().iter().all(|y| y.is_nan()));
}

#[test]
fn a_pinned_destination_is_poison_until_synchronised() {
    let Some(bench) = Bench::new("a_pinned_destination_is_poison_until_synchronised") else { return };
    let (stream, mut host) = (stream(), Pinned::new(64));
    for (order, early) in [("late", false), ("early", true)] {
        bench.emulator.configure(&format!("async={order}"));
        let x = Memory::with(&inputs(64), stream).unwrap();
        ok(unsafe { sys::cuMemcpyDtoHAsync_v2(host.at.cast(), x.0, 256, stream) });
        assert_eq!(host.values().iter().all(|v| v.is_nan()), !early);
        ok(unsafe { sys::cuStreamSynchronize(stream) });
        assert_eq!(host.values(), inputs(64));
    }
}

#[test]
fn a_pinned_source_is_read_late() {
    let Some(bench) = Bench::new("a_pinned_source_is_read_late") else { return };
    let (stream, mut host) = (stream(), Pinned::new(64));
    let mut seen = Vec::new();
    for order in ["late", "early"] {
        bench.emulator.configure(&format!("async={order}"));
        host.values().fill(1.0);
        let x = Memory::new(256).unwrap();
        ok(unsafe { sys::cuMemcpyHtoDAsync_v2(x.0, host.at.cast(), 256, stream) });
        host.values().fill(2.0);
        seen.push(x.read(64, stream).unwrap()[0]);
    }
    assert_eq!(seen, [2.0, 1.0]);
    // Pageable memory is staged at the call.
    bench.emulator.configure("async=late");
    let mut pageable = vec![1f32; 64];
    let x = Memory::with(&pageable, stream).unwrap();
    pageable.fill(2.0);
    assert_eq!(x.read(64, stream).unwrap()[0], 1.0);
}

#[test]
fn streams_need_events() {
    let Some(bench) = Bench::new("streams_need_events") else { return };
    let (a, b) = (stream(), stream());
    let function = kernel("reads_output", "BAD=0").unwrap();
    let mut event = std::ptr::null_mut();
    ok(unsafe { sys::cuEventCreate(&mut event, 0) });
    for waits in [false, true] {
        let (x, y, z) =
            (Memory::with(&inputs(256), a).unwrap(), Memory::new(1024).unwrap(), Memory::new(1024).unwrap());
        launch(function, 1, 256, a, Params { y: y.0, x: x.0, n: 256 }).unwrap();
        ok(unsafe { sys::cuEventRecord(event, a) });
        if waits {
            ok(unsafe { sys::cuStreamWaitEvent(b, event, 0) });
        }
        launch(function, 1, 256, b, Params { y: z.0, x: y.0, n: 256 }).unwrap();
        let got = z.read(256, b);
        if waits {
            assert_eq!(got.unwrap()[5], inputs(256)[5] + 2.0);
            ok(unsafe { sys::cuEventSynchronize(event) });
        } else {
            assert_eq!(got, Err(CUresult::CUDA_ERROR_ASSERT));
            bench.emulator.reset();
        }
    }
}

#[test]
fn memory_freed_too_early_is_reported() {
    let Some(bench) = Bench::new("memory_freed_too_early_is_reported") else { return };
    let stream = stream();
    let function = kernel("reads_output", "BAD=0").unwrap();
    let (x, y) = (Memory::with(&inputs(256), stream).unwrap(), Memory::new(1024).unwrap());
    ok(unsafe { sys::cuStreamSynchronize(stream) });
    launch(function, 1, 256, stream, Params { y: y.0, x: x.0, n: 256 }).unwrap();
    drop(x);
    assert_eq!(y.read(256, stream), Err(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
    assert!(bench.emulator.report().contains("was freed"), "{}", bench.emulator.report());
    bench.emulator.reset();
    // In the stream's order it is right.
    let x = Memory::with(&inputs(256), stream).unwrap();
    launch(function, 1, 256, stream, Params { y: y.0, x: x.0, n: 256 }).unwrap();
    ok(unsafe { sys::cuMemFreeAsync(x.0, stream) });
    std::mem::forget(x);
    assert_eq!(y.read(256, stream).unwrap()[0], inputs(256)[0] + 1.0);
}

#[test]
fn damaged_guard_bands_are_reported() {
    let Some(bench) = Bench::new("damaged_guard_bands_are_reported") else { return };
    for offset in [1000usize, 1003, 1024, usize::MAX] {
        let x = Memory::new(1000).unwrap();
        let band = (x.0 as usize).wrapping_add(offset) as *mut u8;
        unsafe { *band ^= 1 };
        assert_eq!(unsafe { sys::cuCtxSynchronize() }, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert!(bench.emulator.report().contains("allocation of 1000 bytes"), "{}", bench.emulator.report());
        unsafe { *band ^= 1 };
        bench.emulator.reset();
    }
}

#[test]
fn invalid_calls_are_refused_with_a_reason() {
    let Some(bench) = Bench::new("invalid_calls_are_refused_with_a_reason") else { return };
    let stream = stream();
    let function = kernel("reads_output", "BAD=0").unwrap();
    let x = Memory::with(&inputs(256), stream).unwrap();
    let y = Memory::new(1024).unwrap();
    let params = || Params { y: y.0, x: x.0, n: 256 };
    for (grid, block, says) in
        [(0, 256, "size is 0"), (1, 0, "size is 0"), (1, 1025, "1024 threads"), (1, 512, "__launch_bounds__")]
    {
        assert!(launch(function, grid, block, stream, params()).is_err());
        assert!(bench.emulator.report().contains(says), "{}", bench.emulator.report());
    }
    let mut out = [0f32; 300];
    let copied = unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), x.0, 1200) };
    assert_eq!(copied, CUresult::CUDA_ERROR_INVALID_VALUE);
    assert!(bench.emulator.report().contains("do not fit"), "{}", bench.emulator.report());
    assert_eq!(unsafe { sys::cuMemFree_v2(x.0 + 4) }, CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(kernel("nothing", "").err(), Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU));
    // None of these breaks the context.
    launch(function, 1, 256, stream, params()).unwrap();
    assert!(y.read(256, stream).is_ok());
}

#[test]
fn a_programmatic_launch_follows_a_kernel() {
    let Some(bench) = Bench::new("a_programmatic_launch_follows_a_kernel") else { return };
    let (stream, mut event, mut graph) = (stream(), std::ptr::null_mut(), std::ptr::null_mut());
    ok(unsafe { sys::cuEventCreate(&mut event, 0) });
    let function = kernel("never_waits", "BAD=0").unwrap();
    let (x, y) = (Memory::with(&inputs(256), stream).unwrap(), Memory::new(1024).unwrap());
    let params = || Params { y: y.0, x: x.0, n: 256 };
    let early = || launch_programmatic(function, 1, 256, stream, params());
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let between: [(&str, &dyn Fn() -> CUresult); 3] = [
        ("a fill", &|| unsafe { sys::cuMemsetD8Async(y.0, 0, 4, stream) }),
        ("an event", &|| unsafe { sys::cuEventRecord(event, stream) }),
        ("the start of a capture", &|| unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }),
    ];
    for (what, call) in between {
        ok(call());
        assert_eq!(early(), Err(CUresult::CUDA_ERROR_INVALID_VALUE), "{what}");
        assert!(bench.emulator.report().contains("is no kernel"), "{what}: {}", bench.emulator.report());
        let before = bench.emulator.count("programmatic");
        launch(function, 1, 256, stream, params()).unwrap();
        early().unwrap();
        early().unwrap();
        assert_eq!(bench.emulator.count("programmatic") - before, 2, "{what}");
    }
    ok(unsafe { sys::cuStreamEndCapture(stream, &mut graph) });
    assert_eq!(y.read(256, stream).unwrap()[5], inputs(256)[5] + 1.0);
}

#[test]
fn faults_come_on_demand() {
    let Some(bench) = Bench::new("faults_come_on_demand") else { return };
    let attempt = || run("reads_output", "BAD=0", 1000, 1);
    for (fault, want) in [
        ("alloc:2", CUresult::CUDA_ERROR_OUT_OF_MEMORY),
        ("copy:2", CUresult::CUDA_ERROR_UNKNOWN),
        ("load:1", CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU),
        ("launch:1", CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES),
        ("sync:1", CUresult::CUDA_ERROR_ECC_UNCORRECTABLE),
    ] {
        bench.emulator.configure(&format!("fail={fault}"));
        assert_eq!(attempt(), Err(want), "{fault}");
        assert!(attempt().is_ok(), "{fault}: only one call fails");
    }
    bench.emulator.configure("fail=none;memory=5000");
    assert_eq!(attempt(), Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    bench.emulator.configure("memory=17179869184");
    let live = bench.emulator.count("live");
    assert!(attempt().is_ok());
    assert_eq!(bench.emulator.count("live"), live);
}

#[test]
fn a_captured_graph_replays() {
    let Some(bench) = Bench::new("a_captured_graph_replays") else { return };
    let stream = stream();
    let function = kernel("reads_output", "BAD=0").unwrap();
    let x = Memory::with(&[0f32; 256], stream).unwrap();
    let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
    unsafe {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        ok(sys::cuStreamBeginCapture_v2(stream, mode));
        launch(function, 1, 256, stream, Params { y: x.0, x: x.0, n: 256 }).unwrap();
        ok(sys::cuStreamEndCapture(stream, &mut graph));
        ok(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
        let before = bench.emulator.count("launch");
        for _ in 0..5 {
            ok(sys::cuGraphLaunch(exec, stream));
        }
        assert_eq!(bench.emulator.count("launch"), before);
        assert_eq!(x.read(256, stream).unwrap(), [5f32; 256]);
        ok(sys::cuGraphExecDestroy(exec));
        ok(sys::cuGraphDestroy(graph));
    }
}

#[test]
fn a_capture_forbids_what_the_driver_forbids() {
    let Some(bench) = Bench::new("a_capture_forbids_what_the_driver_forbids") else { return };
    let (stream, mut graph, mut event) = (stream(), std::ptr::null_mut(), std::ptr::null_mut());
    ok(unsafe { sys::cuEventCreate(&mut event, 0) });
    ok(unsafe { sys::cuEventRecord(event, stream) });
    let forbidden: [(&str, &dyn Fn() -> CUresult); 4] = [
        ("cuMemAlloc", &|| Memory::new(16).err().unwrap_or(CUresult::CUDA_SUCCESS)),
        ("cuCtxSynchronize", &|| unsafe { sys::cuCtxSynchronize() }),
        ("cuStreamSynchronize", &|| unsafe { sys::cuStreamSynchronize(stream) }),
        ("cuStreamWaitEvent", &|| unsafe { sys::cuStreamWaitEvent(stream, event, 0) }),
    ];
    for (name, call) in forbidden {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        ok(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) });
        assert_ne!(call(), CUresult::CUDA_SUCCESS, "{name}");
        assert!(bench.emulator.report().contains(name), "{name}: {}", bench.emulator.report());
        let ended = unsafe { sys::cuStreamEndCapture(stream, &mut graph) };
        assert_eq!(ended, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "{name}");
        assert_eq!(call(), CUresult::CUDA_SUCCESS, "{name}, outside a capture");
    }
}

#[test]
fn primitives_do_what_the_device_does() {
    let Some(bench) = Bench::new("primitives_do_what_the_device_does") else { return };
    #[repr(C)]
    struct Primitives {
        f: u64,
        y: u64,
        counts: u64,
        low: u64,
        bits: u64,
        blocks: i32,
    }
    const COLUMNS: usize = 16;
    let (stream, n) = (stream(), 6 * 64);
    for (dtype, step_at_one) in [("f32", 0f32), ("f16", 1.0 / 1024.0), ("bf16", 1.0 / 128.0)] {
        for configuration in CONFIGURATIONS {
            bench.emulator.configure(configuration);
            let (f, y) = (Memory::new(4 * n * COLUMNS).unwrap(), Memory::new(4 * (n + n)).unwrap());
            let counts = Memory::with(&[0.0; 2], stream).unwrap();
            let low = Memory::with(&[f32::from_bits(u32::MAX); 2], stream).unwrap();
            let bits = Memory::new(2 * 65536).unwrap();
            let p = Primitives { f: f.0, y: y.0, counts: counts.0, low: low.0, bits: bits.0, blocks: 6 };
            launch_3d(kernel_of("primitives", dtype, "").unwrap(), [3, 1, 2], 64, stream, p).unwrap();
            let got = f.read(n * COLUMNS, stream).unwrap();
            for i in 0..n {
                let (t, block) = (i % 64, i / 64);
                let l = t % 32;
                let v = |lane: usize| lane as f32 - 7.0;
                let x = f64::from(v(l));
                let first_votes: u32 = (0..16).map(|k| u32::from((t / 32 * 32 + k) % 3 == 0) << k).sum();
                let erf = [-1.0, 0.0, 0.842700792949715, 1.0][((x + 1.0).clamp(-0.5, 2.5) + 0.5) as usize];
                let erf = if x == 2.0 { 0.995322265018953 } else { erf };
                let erf = if x == -1.0 { -0.842700792949715 } else { erf };
                let erf = if x == -2.0 { -0.995322265018953 } else { erf };
                let want: [f64; COLUMNS] = [
                    v(l ^ 5).into(),
                    v(if l + 3 < 32 { l + 3 } else { l }).into(),
                    v((t + 1) % 32).into(),
                    first_votes.into(),
                    272.0,
                    24.0,
                    (64 * block * 64 + 2016) as f64,
                    -((64 * block) as f64),
                    x.sin(),
                    (100.0 * x).cos(),
                    (l + 100 * (t / 32) + 640_000) as f64,
                    (if l < 31 { t + 1 } else { t }) as f64,
                    1.0 / ((t + 1) as f64).sqrt(),
                    erf + x.tanh() + x.exp() + x.exp2() + ((t + 1) as f64).ln() + x.abs() + x * x + x,
                    0.0,
                    f64::from(rounded(1.0 + t as f32 / 1024.0, step_at_one)),
                ];
                for (k, want) in want.iter().enumerate() {
                    let (got, close) = (f64::from(got[i * COLUMNS + k]), 4e-6 * want.abs().max(0.05));
                    assert!(
                        (got - want).abs() <= close,
                        "{dtype} column {k}, thread {i}: want {want}, got {got}"
                    );
                }
            }
            let counts: Vec<u32> = counts.read(2, stream).unwrap().iter().map(|c| c.to_bits()).collect();
            assert_eq!(counts, [u32::MAX, n as u32]);
            assert_eq!(low.read(2, stream).unwrap().map_bits(), [1000, 0]);
            if dtype != "f32" {
                // Every 16-bit value survives float and back; a NaN may change its payload only.
                let infinite = if dtype == "f16" { 0x7c00 } else { 0x7f80 };
                let words = bits.read(32768, stream).unwrap().map_bits();
                for value in 0..65536u32 {
                    let back = words[value as usize / 2] >> (16 * (value % 2)) & 0xffff;
                    let nan = value & 0x7fff > infinite;
                    assert!(
                        back == value || nan && back & 0x7fff > infinite,
                        "{dtype} {value:#x}: {back:#x}"
                    );
                }
            }
        }
    }
    assert_eq!(bench.emulator.report(), "");
}

/// `x`, between 1 and 2, to the nearest multiple of `step`, ties to even; unchanged for a step of 0.
fn rounded(x: f32, step: f32) -> f32 {
    if step == 0.0 { x } else { (x / step).round_ties_even() * step }
}

trait MapBits {
    fn map_bits(&self) -> Vec<u32>;
}

impl MapBits for Vec<f32> {
    fn map_bits(&self) -> Vec<u32> {
        self.iter().map(|v| v.to_bits()).collect()
    }
}

#[test]
fn a_child_process_finds_it() {
    let here = "a_child_process_finds_it";
    if std::env::var_os("LDM_EMULATOR_UNITS").is_some() {
        let context = cudarc::driver::CudaContext::new(0).unwrap();
        assert_eq!(context.name().unwrap(), "ldm emulator");
        kernel("reads_output", "BAD=0").unwrap();
        return;
    }
    let Some(bench) = Bench::new(here) else { return };
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let child = child.args(["--exact", here]).envs(bench.emulator.environment()).output().unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}

#[test]
fn cudarc_finds_it() {
    let Some(_bench) = Bench::new("cudarc_finds_it") else { return };
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    assert_eq!(context.name().unwrap(), "ldm emulator");
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    let stream = context.new_stream().unwrap();
    let x = stream.clone_htod(&inputs(100)).unwrap();
    let mut y = stream.alloc_zeros::<f32>(100).unwrap();
    stream.memcpy_dtod(&x, &mut y).unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), inputs(100));
    stream.synchronize().unwrap();
}
