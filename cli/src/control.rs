//! A run's control socket: lines in, lines of JSON out, while the run goes on.
//!
//! What a budget becomes is planned here, beside the run, by the code that planned the run; the session only takes the new numbers of slots
//! between two layers. The socket belongs to the user alone (0600). It goes when the run ends or is interrupted; one that was left
//! behind by a run that was killed is replaced.

use crate::loaded::Loaded;
use crate::ui::{Ui, number};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tierwise_cost::cost::cost_model;
use tierwise_cost::machine::Machine;
use tierwise_cost::units::Bytes;
use tierwise_planner::elastic::with_ram;
use tierwise_runtime::session::process::ProcessMemory;
use tierwise_runtime::session::{BudgetControl, BudgetState, Model};

/// Bytes of a command at most.
pub const MOST_LINE_BYTES: usize = 256;
/// `wait` looks this often whether the run has ended.
const WAIT: Duration = Duration::from_millis(200);

/// The socket that is open, to be removed whichever way the program ends.
static OPEN: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Removes the socket, if there is one.
pub fn remove_socket() {
    if let Some(path) = OPEN.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // It may be gone; then nothing is left to do.
        let _ = std::fs::remove_file(path);
    }
}

/// Ctrl-C sets the flag; a second one ends the program.
///
/// # Errors
/// When the system refuses.
pub fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            remove_socket();
            std::process::exit(130);
        }
    })
    .context("listen for Ctrl-C")?;
    Ok(stop)
}

/// Ctrl-C ends the program, without leaving the socket behind.
///
/// # Errors
/// When the system refuses.
pub fn end_on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        remove_socket();
        std::process::exit(130);
    })
    .context("listen for Ctrl-C")
}

/// A budget that was taken.
#[derive(Debug, Clone)]
struct Change {
    ram: Bytes,
    slots: Bytes,
    at: Instant,
    /// Until the last slot came or went; `None` if that was not looked at, because another change or the end came first.
    took: Option<Duration>,
    resident: Option<Bytes>,
}

/// What answers.
struct Answerer {
    budget: BudgetControl,
    model: Arc<Model>,
    machine: Machine,
    started: Instant,
    changes: Mutex<Vec<Change>>,
}

/// The socket, open until it is dropped.
pub struct ControlSocket {
    path: PathBuf,
    answerer: Arc<Answerer>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Opens the socket at `path` for the session of `loaded`.
    ///
    /// # Errors
    /// When something else is there, or the system refuses.
    pub fn open(path: &Path, loaded: &Loaded, ui: &Ui) -> Result<Self> {
        clear(path)?;
        let open = |path| *OPEN.lock().unwrap_or_else(PoisonError::into_inner) = path;
        // Known before it is there: an interrupt in between finds nothing to remove.
        open(Some(path.to_path_buf()));
        let listener = UnixListener::bind(path)
            .inspect_err(|_| open(None))
            .with_context(|| format!("cannot make the socket {}", path.display()))?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))
            .with_context(|| format!("cannot keep {} to its owner", path.display()))?;
        let answerer = Arc::new(Answerer {
            budget: loaded.session.budget_control(),
            model: Arc::clone(loaded.session.model()),
            machine: loaded.machine.clone(),
            started: Instant::now(),
            changes: Mutex::default(),
        });
        let closing = Arc::new(AtomicBool::new(false));
        let (to_answer, ends) = (Arc::clone(&answerer), Arc::clone(&closing));
        let listen = move || {
            for stream in listener.incoming() {
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let answerer = Arc::clone(&to_answer);
                // One that cannot be had leaves the caller without an answer, and the run as it is.
                let _ = std::thread::Builder::new().name("tierwise-answer".into()).spawn(move || answerer.converse(stream));
            }
        };
        let thread =
            std::thread::Builder::new().name("tierwise-control".into()).spawn(listen).context("a thread for --control")?;
        ui.note(format!("control: tierwise control {} ram SIZE | status | wait", path.display()));
        Ok(Self { path: path.to_path_buf(), answerer, closing, thread: Some(thread) })
    }

    /// What became of the budget, for the run's result.
    pub fn to_json(&self, steps: &[(Instant, Duration)]) -> Value {
        let changes = self.answerer.changes();
        let since = |at: Instant| at.duration_since(self.answerer.started).as_secs_f64();
        let (median_s, longest_s) = median_and_longest(steps);
        json!({
            "changes": changes.iter().map(|c| json!({
                "ram_bytes": c.ram.0, "slots_bytes": c.slots.0, "at_s": since(c.at),
                "took_s": c.took.map(|t| t.as_secs_f64()), "resident_bytes": c.resident.map(|b| b.0),
            })).collect::<Vec<_>>(),
            "step_median_s": median_s, "step_longest_s": longest_s,
            // When each began, in the same seconds as `at_s`, and how long it took.
            "steps": steps.iter().map(|(at, took)| [since(*at), took.as_secs_f64()]).collect::<Vec<_>>(),
        })
    }

    /// The same for people.
    pub fn report(&self, steps: &[(Instant, Duration)]) -> String {
        let (median, longest) = median_and_longest(steps);
        let mut text = format!("\nsteps: median {} ms, longest {} ms", number(median * 1e3), number(longest * 1e3));
        for c in self.answerer.changes() {
            let took =
                c.took.map_or_else(|| "not reached".into(), |t| format!("reached in {} ms", number(t.as_secs_f64() * 1e3)));
            text += &format!("\n--ram {}: {} of slots, {took}", c.ram, c.slots);
        }
        text
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        // Wakes the listener. When nobody can connect, it does not wait for anybody either.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            // A thread that panicked has nothing to clean up.
            let _ = thread.join();
        }
        remove_socket();
    }
}

fn median_and_longest(steps: &[(Instant, Duration)]) -> (f64, f64) {
    let mut sorted: Vec<f64> = steps.iter().map(|(_, took)| took.as_secs_f64()).collect();
    sorted.sort_by(f64::total_cmp);
    (sorted.get(sorted.len() / 2).copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0))
}

/// Removes a socket that a run left behind; refuses what is in use or no socket.
fn clear(path: &Path) -> Result<()> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        bail!("--control {}: there is something that is no socket; give another path, or remove it", path.display());
    }
    if UnixStream::connect(path).is_ok() {
        bail!("--control {}: another run listens there; give another path", path.display());
    }
    std::fs::remove_file(path).with_context(|| format!("cannot remove {}, which a run left behind", path.display()))
}

impl Answerer {
    fn changes(&self) -> Vec<Change> {
        self.look();
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answers line after line until the other end closes.
    fn converse(&self, stream: UnixStream) {
        let Ok(mut out) = stream.try_clone() else { return };
        let mut lines = BufReader::new(stream);
        loop {
            let mut line = String::new();
            match (&mut lines).take(MOST_LINE_BYTES as u64 + 1).read_line(&mut line) {
                Ok(0) => return,
                Ok(_) if line.len() > MOST_LINE_BYTES => {
                    let _ = writeln!(out, "{}", refusal(&format!("a command has at most {MOST_LINE_BYTES} bytes")));
                    return;
                }
                Ok(_) => {}
                Err(e) => {
                    let _ = writeln!(out, "{}", refusal(&format!("a command is a line of text: {e}")));
                    return;
                }
            }
            if line.trim().is_empty() {
                continue;
            }
            if writeln!(out, "{}", self.answer(line.trim())).is_err() {
                return;
            }
        }
    }

    fn answer(&self, line: &str) -> Value {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("ram"), Some(size), None) => match self.set_ram(size) {
                Ok(()) => self.status(),
                Err(e) => refusal(&format!("{e:#}")),
            },
            (Some("status"), None, None) => self.status(),
            (Some("wait"), None, None) => {
                loop {
                    let sizes = self.budget.wait(WAIT).sizes;
                    if sizes.is_settled() || sizes.ended {
                        break;
                    }
                }
                self.status()
            }
            _ => refusal(&format!("{line:?}: expected `ram SIZE` (as in `ram 4G`), `status` or `wait`")),
        }
    }

    fn set_ram(&self, size: &str) -> Result<()> {
        let ram: Bytes = size.parse()?;
        // One change at a time: each starts from the plan that the one before left.
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let cost = cost_model(&self.machine);
        let plan = with_ram(&self.budget.plan(), self.model.spec(), &self.machine, cost.as_ref(), ram)?;
        let slots = plan.slot_bytes();
        self.note_end(&mut changes);
        self.budget.follow(plan)?;
        changes.push(Change { ram, slots, at: Instant::now(), took: None, resident: None });
        Ok(())
    }

    /// Keeps what became of the last change.
    fn look(&self) {
        self.note_end(&mut self.changes.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn note_end(&self, changes: &mut [Change]) {
        if let Some(last) = changes.last_mut().filter(|c| c.took.is_none()) {
            last.took = self.budget.state().sizes.took;
            last.resident = last.took.and_then(|_| ProcessMemory::look(&[])).map(|m| m.resident);
        }
    }

    fn status(&self) -> Value {
        self.look();
        let BudgetState { sizes, held, target } = self.budget.state();
        let plan = self.budget.plan();
        let count = |slots: &[u32]| slots.iter().sum::<u32>();
        let memory = ProcessMemory::look(&self.model.paths());
        json!({
            "ok": true, "ram_bytes": plan.plan().request.limits.ram.map(|b| b.0),
            "slots": {
                "held": count(&sizes.held), "planned": count(&sizes.target), "held_bytes": held.0, "planned_bytes": target.0,
            },
            "settled": sizes.is_settled(), "changes": sizes.changes, "took_s": sizes.took.map(|t| t.as_secs_f64()),
            "refused": sizes.refused, "ended": sizes.ended,
            "resident_bytes": memory.map(|m| m.resident.0), "own_bytes": memory.map(|m| m.anonymous.0),
            "model_pages_bytes": memory.map(|m| m.model.0),
        })
    }
}

fn refusal(error: &str) -> Value {
    json!({ "ok": false, "error": error })
}
