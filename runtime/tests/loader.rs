//! Experts from disk: both back-ends, through the page cache and past it, give the bits of the run in memory; demands go first;
//! files that are cut are reported.

mod session_common;

use session_common::*;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;
use tierwise_cost::machine::MemoryKind;
use tierwise_cost::units::BytesPerS;
use tierwise_planner::engine::{ExpertKey, Purpose, SlotId};
use tierwise_runtime::RuntimeError;
use tierwise_runtime::exec::loader::{ExpertReader, ExpertTable, FileReader, Loader, SlotBuffer};
use tierwise_runtime::session::{IoBackend, IoOptions, Model, PageCache, Session, SessionConfig, Throttle};

const BACKENDS: [IoBackend; 2] = [IoBackend::Uring, IoBackend::Threads];

/// The back-ends that this system has; says which are missing.
fn backends(model: &Model) -> Vec<IoBackend> {
    let table = Arc::new(model.expert_table([0]));
    let here = |b: &IoBackend| match Loader::open(&table, IoOptions { backend: *b, page_cache: PageCache::Use }) {
        Ok(_) => true,
        Err(e) => {
            println!("skipped {b:?}: {e}");
            false
        }
    };
    BACKENDS.into_iter().filter(here).collect()
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.spec().vocab_size).collect()
}

#[test]
fn every_way_of_reading_gives_the_same_bits() {
    let mut paths: Vec<_> = FAMILIES.iter().flat_map(|f| [golden(f), golden(f).join("model-bf16.gguf")]).collect();
    if let Some(tiny) = tiny() {
        paths.extend(["tiny-f16.gguf", "tiny-q4_k_m.gguf"].map(|f| tiny.join(f)));
    }
    for path in paths {
        let model = open(&path);
        let spec = model.spec();
        let tokens = tokens(&model, 50);
        let run = |s: &mut Session| {
            let (mut all, _) = s.logits_all(&tokens[..30]).expect("computed").into_raw_vec_and_offset();
            for t in &tokens[30..] {
                all.extend(s.decode(*t).expect("computed"));
            }
            all
        };
        let expected = run(&mut session(&model, F16_KV));
        for backend in backends(&model) {
            for page_cache in [PageCache::Auto, PageCache::Use] {
                for slots in [1, 3] {
                    let io = IoOptions { backend, page_cache };
                    let plan = disk_plan(spec, F16_KV, slots, |l, e| slots == 1 || (l + e) % 2 == 0);
                    let config = SessionConfig { io, ..SessionConfig::new(2) };
                    let mut s = Session::open(Arc::clone(&model), &plan, config).expect("opened");
                    assert!(run(&mut s) == expected, "{}: {io:?} with {slots} slots", path.display());
                    assert!(s.statistics().engine.loads > 0);
                    let report = s.io().expect("it reads").clone();
                    let backend_name = if backend == IoBackend::Uring { "io_uring" } else { "threads" };
                    assert_eq!(report.backend, backend_name);
                    assert!(page_cache == PageCache::Auto || report.page_cache == "used", "{report}");
                    if slots == 1 && path.ends_with("tiny-f16.gguf") {
                        println!("{report}");
                    }
                }
            }
        }
    }
}

/// A throttled disk: the bits of the run in memory by both back-ends, no faster than the rate.
#[test]
fn a_throttled_disk_keeps_to_its_rate() {
    let model = open(&golden("qwen3moe").join("model-bf16.gguf"));
    let tokens = tokens(&model, 30);
    let run = |s: &mut Session| tokens.iter().flat_map(|t| s.decode(*t).expect("computed").to_vec()).collect::<Vec<f32>>();
    let expected = run(&mut session(&model, F16_KV));
    for backend in backends(&model) {
        let plan = disk_plan(model.spec(), F16_KV, 2, |l, e| (l + e) % 2 == 0);
        let disk = plan.plan().tiers.iter().find(|t| t.kind == MemoryKind::Disk).expect("experts on disk").memory.clone();
        let io = IoOptions { backend, page_cache: PageCache::Use };
        let mut s = Session::open(Arc::clone(&model), &plan, SessionConfig { io, ..SessionConfig::new(2) }).expect("opened");
        let rate = plan.expert_bytes(plan.moe_layers()[0]).0 as f64 * 500.0;
        let start = Instant::now();
        s.throttle(&plan, &[Throttle { memory: disk, rate: BytesPerS(rate) }]).expect("a memory with experts");
        assert!(run(&mut s) == expected, "{backend:?}");
        let (seconds, slow) = (start.elapsed().as_secs_f64(), s.throttled().remove(0));
        let loaded: u64 = s.statistics().engine.bytes_loaded_by_tier.iter().map(|b| b.0).sum();
        assert!(slow.paid_bytes > 0 && slow.paid_bytes <= loaded, "{slow:?}, {loaded} loaded");
        assert!(slow.paid_bytes as f64 <= seconds * rate * (1.0 + 1e-6), "{slow:?} in {seconds} s");
    }
}

fn slot(index: u32) -> SlotId {
    SlotId { pool: 0, index }
}

fn bytes_of(table: &ExpertTable, key: ExpertKey, slot: &SlotBuffer) -> Vec<u8> {
    table.expert(key).iter().flat_map(|e| slot.as_slice()[e.in_slot()..e.in_slot() + e.bytes].to_vec()).collect()
}

/// A file that is cut while in use fails each load with one clear error and gives the buffer back; whole again, it reads again.
#[test]
fn a_cut_file_is_reported_and_a_whole_one_read_again() {
    let original = golden("qwen3moe").join("model-bf16.gguf");
    let whole = std::fs::read(&original).expect("a golden file");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for backend in backends(&open(&original)) {
        for page_cache in [PageCache::Auto, PageCache::Use] {
            let path = folder.path().join(format!("{backend:?}-{page_cache:?}.gguf"));
            std::fs::write(&path, &whole).expect("written");
            let table = Arc::new(open(&path).expert_table([0, 1]));
            let mut loader = Loader::open(&table, IoOptions { backend, page_cache }).expect("opened");
            let key = ExpertKey { layer: 1, expert: 2 };
            let first = table.expert(key).iter().map(|e| e.offset).min().expect("three");
            let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
            for cut in [first, first + 7, first + 5000] {
                file.set_len(cut).expect("cut");
                loader.submit(key, slot(0), SlotBuffer::zeroed(table.slot_bytes(1)), Purpose::Demand);
                let failed = loader.wait().expect("an answer");
                let reason = failed.result.expect_err("the file is too short");
                assert!(reason.contains(&path.display().to_string()) && reason.contains("cut while in use"), "{reason}");
                assert_eq!((failed.key, failed.slot, failed.buffer.len()), (key, slot(0), table.slot_bytes(1)));
                std::fs::write(&path, &whole).expect("written");
                loader.submit(key, slot(0), failed.buffer, Purpose::Demand);
                let loaded = loader.wait().expect("an answer");
                assert_eq!(loaded.result, Ok(()));
                let expected: Vec<u8> = table
                    .expert(key)
                    .iter()
                    .flat_map(|e| whole[e.offset as usize..e.offset as usize + e.bytes].to_vec())
                    .collect();
                assert_eq!(bytes_of(&table, key, &loaded.buffer), expected);
            }
            assert!(loader.wait().is_none(), "nothing is under way");
        }
    }
}

/// Blocks until told.
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
    /// This expert does not wait.
    free: ExpertKey,
}

impl ExpertReader for Gate {
    fn read(&self, key: ExpertKey, buffer: &mut [u8]) -> Result<(), String> {
        let mut open = self.open.lock().expect("no panic");
        while !*open && key != self.free {
            open = self.changed.wait(open).expect("no panic");
        }
        buffer.fill(key.expert as u8);
        Ok(())
    }
}

#[test]
fn demands_do_not_wait_for_prefetches() {
    for promoted in [false, true] {
        let wanted = ExpertKey { layer: 0, expert: 7 };
        let gate = Arc::new(Gate { open: Mutex::new(false), changed: Condvar::new(), free: wanted });
        let reader: Arc<dyn ExpertReader> = Arc::<Gate>::clone(&gate);
        let mut loader = Loader::with_reader(&reader).expect("threads");
        for expert in 0..7 {
            let key = ExpertKey { layer: 0, expert };
            loader.submit(key, slot(expert), SlotBuffer::zeroed(64), Purpose::Prefetch);
        }
        if promoted {
            loader.submit(wanted, slot(7), SlotBuffer::zeroed(64), Purpose::Prefetch);
            loader.promote(wanted);
        } else {
            loader.submit(wanted, slot(7), SlotBuffer::zeroed(64), Purpose::Demand);
        }
        // All prefetches are stuck, in the readers or in the queue.
        assert_eq!(loader.wait().expect("an answer").key, wanted);
        *gate.open.lock().expect("no panic") = true;
        gate.changed.notify_all();
        let mut rest: Vec<_> = std::iter::from_fn(|| loader.wait()).map(|l| (l.key.expert, l.buffer.as_slice()[0])).collect();
        rest.sort_unstable();
        assert_eq!(rest, (0..7).map(|e| (e, e as u8)).collect::<Vec<_>>());
    }
}

#[test]
fn io_uring_reads_many_experts_at_once_and_can_be_dropped_amid_them() {
    let Some(tiny) = tiny() else { return };
    let path = tiny.join("tiny-f16.gguf");
    let model = open(&path);
    if !backends(&model).contains(&IoBackend::Uring) {
        return;
    }
    let file = std::fs::read(&path).expect("read");
    let layers: Vec<u32> = model.spec().moe_layers().map(|(l, _)| l).collect();
    let experts = model.spec().moe_layers().map(|(_, m)| m.num_experts).min().expect("an MoE model");
    let table = Arc::new(model.expert_table(layers.iter().copied()));
    for page_cache in [PageCache::Auto, PageCache::Use] {
        let io = IoOptions { backend: IoBackend::Uring, page_cache };
        let mut loader = Loader::open(&table, io).expect("opened");
        let keys: Vec<_> = layers.iter().flat_map(|l| (0..experts).map(|expert| ExpertKey { layer: *l, expert })).collect();
        for (i, key) in keys.iter().enumerate() {
            let purpose = if i % 3 == 0 { Purpose::Demand } else { Purpose::Prefetch };
            loader.submit(*key, slot(i as u32), SlotBuffer::zeroed(table.slot_bytes(key.layer)), purpose);
            if i % 5 == 1 {
                loader.promote(*key);
            }
        }
        let mut seen = Vec::new();
        while let Some(loaded) = loader.wait() {
            assert_eq!(loaded.result, Ok(()));
            let expected: Vec<u8> = table
                .expert(loaded.key)
                .iter()
                .flat_map(|e| file[e.offset as usize..e.offset as usize + e.bytes].to_vec())
                .collect();
            assert_eq!(bytes_of(&table, loaded.key, &loaded.buffer), expected);
            assert_eq!(keys[loaded.slot.index as usize], loaded.key);
            seen.push(loaded.key);
        }
        seen.sort_unstable();
        assert_eq!(seen, keys);
        for key in &keys {
            loader.submit(*key, slot(0), SlotBuffer::zeroed(table.slot_bytes(key.layer)), Purpose::Demand);
        }
        drop(loader);
        // A slot that is too small is refused, not written over.
        let mut loader = Loader::open(&table, io).expect("opened");
        loader.submit(keys[0], slot(0), SlotBuffer::zeroed(100), Purpose::Demand);
        assert!(loader.wait().expect("an answer").result.expect_err("too small").contains("too small"));
    }
}

#[test]
fn what_cannot_be_had_is_refused_or_explained() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    std::fs::copy(golden("olmoe").join("model-bf16.gguf"), &path).expect("copied");
    let table = Arc::new(open(&path).expert_table([0]));
    std::fs::remove_file(&path).expect("removed");
    let gone = Loader::open(&table, IoOptions::default());
    assert!(matches!(gone, Err(RuntimeError::Io { action: "open", .. })), "{gone:?}");
    // A file of procfs has no blocks to read directly.
    let mut odd = ExpertTable::new(1);
    odd.add_layer(0, std::iter::once([0, 8, 16].map(|at| (Path::new("/proc/self/status"), at, 8))));
    let odd = Arc::new(odd);
    match FileReader::direct(Arc::clone(&odd)).expect("it can be opened") {
        Ok(_) => println!("skipped: this system reads /proc directly"),
        Err(why) => {
            assert!(why.contains("refuses direct reads"), "{why}");
            let auto = Loader::open(&odd, IoOptions::default()).expect("falls back");
            let report = auto.report().expect("it reads");
            assert_eq!((report.page_cache, report.page_cache_reason.as_str()), ("used", why.as_str()));
            let asked = Loader::open(&odd, IoOptions { page_cache: PageCache::Bypass, ..IoOptions::default() });
            let Err(RuntimeError::BadRequest { found, .. }) = asked else { panic!("{asked:?}") };
            assert_eq!(found, why);
        }
    }
}
