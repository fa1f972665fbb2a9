//! Speed of the CUDA kernels beside what the card can: `gpu_bench [--kernels FOLDER] [--nvrtc FOLDER] [--json FILE] [--markdown FILE]
//! [--date TEXT]`.
//!
//! Bandwidth is measured against copies within the card's memory (bytes read and written), products against tensor cores that do
//! nothing else. Decode goes through all experts of a layer in turn, so that nothing comes from the card's caches. Launches are included.

use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use tierwise_cost::model::Activation;
use tierwise_cost::quant::QuantFormat;
use tierwise_planner::engine::Purpose;
use tierwise_runtime::atomic_file::write_atomic;
use tierwise_runtime::backend::check::group_rows;
use tierwise_runtime::backend::cuda::{self, CudaBackend, Options};
use tierwise_runtime::backend::device::{DeviceBackend, View};
use tierwise_runtime::backend::op::{DeviceAttention, DeviceExperts, DeviceMatrix, DeviceOp, KvElement, RowGroups};
use tierwise_runtime::error::Result;

/// Measurements of each thing; the fastest counts.
const TRIES: usize = 5;

struct Bench {
    backend: CudaBackend,
    copy_bytes_per_s: f64,
    mma_per_s: f64,
    rows: Vec<Value>,
}

/// hidden, inner size, experts, experts per token.
const MODELS: &[(&str, [u32; 4], QuantFormat, QuantFormat)] = &[
    ("Qwen3-30B-A3B", [2048, 768, 128, 8], QuantFormat::Q4_K, QuantFormat::Q4_K),
    ("Qwen3-30B-A3B", [2048, 768, 128, 8], QuantFormat::Q8_0, QuantFormat::Q8_0),
    ("gpt-oss-20b", [2880, 2880, 32, 4], QuantFormat::MXFP4, QuantFormat::MXFP4),
    ("OLMoE", [2048, 1024, 64, 8], QuantFormat::Q4_K, QuantFormat::Q6_K),
    ("OLMoE", [2048, 1024, 64, 8], QuantFormat::BF16, QuantFormat::BF16),
    ("Mixtral-8x7B", [4096, 14336, 8, 2], QuantFormat::Q4_K, QuantFormat::Q4_K),
    ("Mixtral-8x7B", [4096, 14336, 8, 2], QuantFormat::MXFP4, QuantFormat::MXFP4),
];

impl Bench {
    fn alloc(&mut self, bytes: u64) -> Result<View> {
        let bytes = bytes.next_multiple_of(256);
        Ok(View { buffer: self.backend.alloc(bytes, "a bench's buffer")?, offset_bytes: 0, bytes })
    }

    /// Bytes that do not repeat: zeros would flatter the clocks. Half-precision fields get small exponents.
    fn filled(&mut self, bytes: u64) -> Result<View> {
        let view = self.alloc(bytes)?;
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut window = vec![0u8; 16 << 20];
        for start in (0..view.bytes).step_by(window.len()) {
            for word in window.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&(state & 0xBBBB_BBBB_BBBB_BBBB).to_le_bytes());
            }
            let len = (view.bytes - start).min(window.len() as u64);
            self.backend.write(view.part(start, len), &window[..len as usize])?;
        }
        Ok(view)
    }

    fn words(&mut self, words: &[u32]) -> Result<View> {
        let view = self.alloc(words.len() as u64 * 4)?;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.backend.write(view, &bytes)?;
        Ok(view)
    }

    fn fastest_s(&mut self, ops: &[DeviceOp]) -> Result<f64> {
        self.backend.submit(ops)?;
        let mut best = f64::INFINITY;
        for _ in 0..TRIES {
            best = best.min(f64::from(self.backend.timed_ms(ops)?) * 1e-3);
        }
        Ok(best)
    }

    fn report(&mut self, what: &str, seconds: f64, count: u32, bytes: f64, flops: f64) {
        let each = f64::from(count);
        let row = json!({
            "what": what, "microseconds": seconds / each * 1e6,
            "gb_per_s": bytes / seconds * 1e-9, "share_of_copy": bytes / seconds / self.copy_bytes_per_s,
            "tflop_per_s": flops / seconds * 1e-12, "share_of_mma": flops / seconds / self.mma_per_s,
        });
        println!("{row}");
        self.rows.push(row);
    }

    fn experts(
        &mut self,
        name: &str,
        [hidden, inner, count, k]: [u32; 4],
        gate: QuantFormat,
        down: QuantFormat,
        tokens: u32,
    ) -> Result<()> {
        let up_bytes = gate.row_bytes(hidden.into()).expect("whole blocks") * u64::from(inner);
        let down_bytes = down.row_bytes(inner.into()).expect("whole blocks") * u64::from(hidden);
        let (up_place, down_place) = (up_bytes.next_multiple_of(16), down_bytes.next_multiple_of(16));
        let expert_bytes = 2 * up_place + down_place;
        let arena = self.filled(expert_bytes * u64::from(count))?;
        let table: Vec<u32> = (0..u64::from(count))
            .flat_map(|e| [0, up_place, 2 * up_place].map(|m| ((e * expert_bytes + m) / 16) as u32))
            .collect();
        let experts = DeviceExperts {
            buffer: arena.buffer,
            table: self.words(&table)?,
            num_experts: count,
            formats: [gate, gate, down],
            inner_size: inner,
            hidden,
            activation: Activation::Silu,
            biases: None,
        };
        let x = self.filled(u64::from(tokens * hidden) * 4)?;
        let rows = tokens * k;
        let inner_view = self.alloc(u64::from(rows) * u64::from(inner) * 4)?;
        let out = self.alloc(u64::from(rows) * u64::from(hidden) * 4)?;
        let op = |ids, groups| DeviceOp::Experts { experts, x, ids, rows_per_input: k, inner: inner_view, out, rows, groups };
        let flops = 2.0 * 3.0 * f64::from(rows) * f64::from(hidden) * f64::from(inner);
        let read = (2 * up_bytes + down_bytes) as f64;
        if tokens == 1 {
            // One token after the other through all experts.
            let mut ops = Vec::new();
            for first in (0..count).step_by(k as usize).filter(|first| first + k <= count) {
                let ids = self.words(&(first..first + k).collect::<Vec<_>>())?;
                ops.push(op(ids, None));
            }
            let steps = ops.len() as u32;
            let seconds = self.fastest_s(&ops)?;
            let what = format!("{name} decode experts {gate}/{down}, {k} of {count}");
            self.report(&what, seconds, steps, read * f64::from(steps * k), flops * f64::from(steps));
        } else {
            let ids: Vec<u32> = (0..rows).map(|r| r.wrapping_mul(2_654_435_761) >> 7).map(|r| r % count).collect();
            let (order, tiles) = group_rows(&ids, |_| true);
            let groups =
                RowGroups { order: self.words(&order)?, tiles: self.words(tiles.as_flattened())?, num_tiles: tiles.len() as u32 };
            let ids = self.words(&ids)?;
            let ops = [op(ids, Some(groups))];
            let seconds = self.fastest_s(&ops)?;
            self.report(
                &format!("{name} prefill experts {gate}/{down}, {tokens} tokens"),
                seconds,
                1,
                read * f64::from(count),
                flops,
            );
        }
        Ok(())
    }

    fn matmul(&mut self, format: QuantFormat, rows: u32, cols: u32, tokens: u32) -> Result<()> {
        let bytes = format.row_bytes(cols.into()).expect("whole blocks") * u64::from(rows);
        // Several matrices, together far larger than the caches.
        let count = if tokens > 8 { 1 } else { (1u64 << 30).div_ceil(bytes) as u32 };
        let x = self.filled(u64::from(tokens * cols) * 4)?;
        let out = self.alloc(u64::from(tokens) * u64::from(rows) * 4)?;
        let mut ops = Vec::new();
        for _ in 0..count {
            let view = self.filled(bytes)?;
            ops.push(DeviceOp::MatMul { weight: DeviceMatrix { format, rows, cols, view }, bias: None, x, out, tokens });
        }
        let seconds = self.fastest_s(&ops)?;
        let times = f64::from(count);
        let flops = 2.0 * f64::from(rows) * f64::from(cols) * f64::from(tokens) * times;
        self.report(&format!("product {format} {rows} x {cols}, {tokens} tokens"), seconds, count, bytes as f64 * times, flops);
        Ok(())
    }

    fn attention(&mut self, tokens: u32, past: u32, heads: u32, kv_heads: u32, dim: u32) -> Result<()> {
        let positions = past + tokens;
        let cache = u64::from(positions) * u64::from(kv_heads * dim) * 2;
        let (keys, values) = (self.filled(cache)?, self.filled(cache)?);
        let (q, out) = (self.filled(u64::from(tokens * heads * dim) * 4)?, self.alloc(u64::from(tokens * heads * dim) * 4)?);
        let a = DeviceAttention {
            q,
            keys,
            values,
            value_stride: dim,
            out,
            sinks: None,
            element: KvElement::F16,
            tokens,
            past,
            heads,
            kv_heads,
            key_dim: dim,
            value_dim: dim,
            scale: 1.0 / (dim as f32).sqrt(),
            window: None,
            chunk: None,
            softcap: None,
        };
        let seconds = self.fastest_s(&[DeviceOp::Attention(a)])?;
        let seen = f64::from(tokens) * (f64::from(past) + f64::from(tokens + 1) / 2.0);
        let flops = 4.0 * seen * f64::from(heads * dim);
        let what = format!("attention {tokens} tokens after {past}, {heads} heads over {kv_heads}, {dim}, f16 cache");
        self.report(&what, seconds, 1, 2.0 * cache as f64, flops);
        Ok(())
    }
}

/// GB/s from ordinary host memory through the copier, by so many loader threads.
fn host_copies(bench: &mut Bench) -> Result<Vec<(usize, f64)>> {
    const BYTES: u64 = 256 << 20;
    let mut found = Vec::new();
    for threads in [1usize, 2, 4, 8] {
        let target = bench.alloc(BYTES * threads as u64)?;
        let source = vec![0x5Au8; BYTES as usize];
        let copier = bench.backend.copier();
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            std::thread::scope(|s| {
                let copies: Vec<_> = (0..threads as u64)
                    .map(|i| {
                        let (copier, source) = (&copier, &source);
                        s.spawn(move || copier.copy(target.part(i * BYTES, BYTES), source, Purpose::Demand))
                    })
                    .collect();
                copies.into_iter().try_for_each(|c| c.join().expect("a copy does not panic"))
            })?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        found.push((threads, (BYTES * threads as u64) as f64 / best * 1e-9));
    }
    Ok(found)
}

fn markdown(bench: &Bench, host: &[(usize, f64)], date: &str) -> String {
    let info = bench.backend.info();
    let (copy, mma) = (bench.copy_bytes_per_s * 1e-9, bench.mma_per_s * 1e-12);
    let mut text = format!(
        "## Kernels: {}, {}, {date}\n\nCopies within the card: {copy:.0} GB/s read and written. Tensor cores, bf16, mma alone: {mma:.0} \
         TFLOP/s.\n\n| what | us | GB/s | of copies | TFLOP/s | of mma |\n|---|---|---|---|---|---|\n",
        info.name, info.driver
    );
    let host: Vec<_> = host.iter().map(|(threads, gb)| format!("{gb:.1} GB/s by {threads}")).collect();
    for row in &bench.rows {
        let n = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(
            text,
            "| {} | {:.1} | {:.0} | {:.0} % | {:.1} | {:.0} % |",
            row["what"].as_str().unwrap_or_default(),
            n("microseconds"),
            n("gb_per_s"),
            100.0 * n("share_of_copy"),
            n("tflop_per_s"),
            100.0 * n("share_of_mma")
        );
    }
    let _ = writeln!(text, "\nFrom ordinary host memory to the card, by loader threads: {}.", host.join(", "));
    text
}

fn run() -> Result<()> {
    let (mut options, mut json_file, mut markdown_file, mut date) =
        (Options::default(), None, None, String::from("no date given"));
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next();
        match argument.as_str() {
            "--kernels" => options.kernels = value.map(PathBuf::from),
            "--nvrtc" => options.nvrtc = value.map(PathBuf::from),
            "--json" => json_file = value.map(PathBuf::from),
            "--markdown" => markdown_file = value.map(PathBuf::from),
            "--date" => date = value.unwrap_or_default(),
            other => eprintln!("unknown argument {other}"),
        }
    }
    let backend = cuda::open(options)?;
    let mut bench = Bench { backend, copy_bytes_per_s: 0.0, mma_per_s: 0.0, rows: Vec::new() };
    let (a, b) = (bench.filled(1 << 30)?, bench.alloc(1 << 30)?);
    bench.backend.timed_copy_ms(a, b, 2)?;
    for _ in 0..TRIES {
        let seconds = f64::from(bench.backend.timed_copy_ms(a, b, 8)?) * 1e-3;
        bench.copy_bytes_per_s = bench.copy_bytes_per_s.max(16.0 * a.bytes as f64 / seconds);
    }
    for _ in 0..TRIES {
        bench.mma_per_s = bench.mma_per_s.max(bench.backend.measured_mma_rate()?);
    }
    for &(name, shape, gate, down) in MODELS {
        bench.experts(name, shape, gate, down, 1)?;
    }
    for &(name, shape, gate, down) in MODELS {
        bench.experts(name, shape, gate, down, 2048)?;
    }
    for format in [QuantFormat::Q4_K, QuantFormat::MXFP4, QuantFormat::Q8_0, QuantFormat::Q6_K, QuantFormat::BF16] {
        for tokens in [1, 8, 16, 2048] {
            bench.matmul(format, 8192, 8192, tokens)?;
        }
    }
    for (tokens, past, heads, kv_heads, dim) in
        [(1, 8192, 32, 4, 128), (1, 65536, 32, 4, 128), (1, 8192, 16, 16, 128), (2048, 0, 32, 4, 128)]
    {
        bench.attention(tokens, past, heads, kv_heads, dim)?;
    }
    let host = host_copies(&mut bench)?;
    let info = bench.backend.info().clone();
    let result = json!({
        "date": date, "device": info.name, "driver": info.driver, "copy_bytes_per_s": bench.copy_bytes_per_s,
        "mma_flop_per_s": bench.mma_per_s, "allocated_bytes": bench.backend.allocated_bytes(), "kernels": bench.rows,
        "host_to_device_gb_per_s_by_threads": host,
    });
    if let Some(file) = json_file {
        write_atomic(&file, format!("{result:#}\n").as_bytes())?;
    }
    let text = markdown(&bench, &host, &date);
    println!("{text}");
    markdown_file.map_or(Ok(()), |file| write_atomic(&file, text.as_bytes()))
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
