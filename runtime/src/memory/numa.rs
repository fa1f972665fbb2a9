//! The system's calls about memory nodes: bind a range, ask where its pages are, move them. The one place with these calls.
//!
//! mbind(2), move_pages(2), set_mempolicy(2), mincore(2) and sysconf(3) as their manual pages describe them, through `libc`; no
//! library of the system is linked. None of them can make a program read or write what it may not: they choose and report physical
//! pages. Containers often refuse them (`EPERM`, Docker's default filter) and kernels without NUMA lack them (`ENOSYS`).

use std::io;
use std::ops::Range;

/// Numbers of nodes are below this (`CONFIG_NODES_SHIFT` of Linux is at most 10).
pub const MAX_NODES: u32 = 1024;

/// Since Linux 6.9 (`include/uapi/linux/mempolicy.h`): pages in turn, by the weights under `/sys/kernel/mm/mempolicy`.
const MPOL_WEIGHTED_INTERLEAVE: libc::c_int = 6;
/// Since Linux 5.15: any of the nodes if they have room.
const MPOL_PREFERRED_MANY: libc::c_int = 5;
/// Move pages that only this process uses.
const MPOL_MF_MOVE: libc::c_int = 2;

/// Pages asked about or moved by one call: 128 KiB of pointers.
const PAGES_AT_ONCE: usize = 16 << 10;

/// How pages are spread over nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// On these nodes and no other.
    Bind,
    /// In turn over these nodes.
    Interleave,
    /// In turn over these nodes, by the system's weights; kernels before 6.9 refuse it (`EINVAL`).
    WeightedInterleave,
}

/// A set of nodes as the kernel takes it.
struct Mask([libc::c_ulong; Mask::WORDS]);

impl Mask {
    const WORD_BITS: usize = libc::c_ulong::BITS as usize;
    const WORDS: usize = MAX_NODES as usize / Self::WORD_BITS;
    /// The kernel takes one bit less than it is told.
    const BITS: libc::c_ulong = MAX_NODES as libc::c_ulong + 1;

    fn new(nodes: &[u32]) -> io::Result<Self> {
        let mut words = [0; Self::WORDS];
        for node in nodes {
            if *node >= MAX_NODES {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("node {node}: numbers are below {MAX_NODES}")));
            }
            words[*node as usize / Self::WORD_BITS] |= 1 << (*node as usize % Self::WORD_BITS);
        }
        Ok(Self(words))
    }
}

/// The result of a system call.
fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Bytes of an ordinary page.
pub fn page_bytes() -> usize {
    // SAFETY: sysconf takes a number and gives one; it touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).ok().filter(|b| b.is_power_of_two()).unwrap_or(4096)
}

/// From now on pages of `range` are taken from `nodes`. Only pages that are not there yet; `range` begins at a page.
///
/// # Errors
/// The system's reason: `EINVAL` for a node that is not there or not allowed, `EPERM` in a container that forbids the call.
pub fn bind(range: &mut [u8], nodes: &[u32], spread: Spread) -> io::Result<()> {
    let mode = match spread {
        Spread::Bind => libc::MPOL_BIND,
        Spread::Interleave => libc::MPOL_INTERLEAVE,
        Spread::WeightedInterleave => MPOL_WEIGHTED_INTERLEAVE,
    };
    let mask = Mask::new(nodes)?;
    // SAFETY: the range is ours and mapped, because it is a slice; the mask lives through the call and has the bits that are announced
    // (one less is read). The call changes from which node later pages come, never their contents.
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, range.as_mut_ptr(), range.len(), mode as libc::c_long, mask.0.as_ptr(), Mask::BITS, 0_u32)
    };
    checked(result).map(drop)
}

/// From now on this thread, and threads that it starts, take memory from `nodes` as long as there is room on them.
///
/// # Errors
/// The system's reason, as for [`bind`].
pub fn prefer(nodes: &[u32]) -> io::Result<()> {
    let mode = if nodes.len() == 1 { libc::MPOL_PREFERRED } else { MPOL_PREFERRED_MANY };
    let mask = Mask::new(nodes)?;
    // SAFETY: the mask lives through the call and has the bits that are announced. The call changes where later pages come from.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode as libc::c_long, mask.0.as_ptr(), Mask::BITS) };
    checked(result).map(drop)
}

/// Bits of a word of a processors' mask.
const CPU_BITS: usize = libc::c_ulong::BITS as usize;
/// More processors than Linux can be built for (`NR_CPUS` is at most 8192).
const MAX_CPUS: usize = 8192;

/// From now on this thread runs on these processors only.
///
/// # Errors
/// The system's reason: `EINVAL` for processors that are not there or not allowed.
pub fn run_on(cpus: &[u32]) -> io::Result<()> {
    let mut words: [libc::c_ulong; MAX_CPUS / CPU_BITS] = [0; MAX_CPUS / CPU_BITS];
    for cpu in cpus {
        let Some(word) = words.get_mut(*cpu as usize / CPU_BITS) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("processor {cpu}: numbers are below {MAX_CPUS}")));
        };
        *word |= 1 << (*cpu as usize % CPU_BITS);
    }
    // SAFETY: thread 0 is the calling one; the mask has the bytes that are announced and lives through the call, which only reads it.
    let result = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0_i32, size_of_val(&words), words.as_ptr()) };
    checked(result).map(drop)
}

/// Processors that this thread may run on, ascending.
///
/// # Errors
/// The system's reason.
pub fn allowed_cpus() -> io::Result<Vec<u32>> {
    let mut words: [libc::c_ulong; MAX_CPUS / CPU_BITS] = [0; MAX_CPUS / CPU_BITS];
    // SAFETY: thread 0 is the calling one; the mask has the bytes that are announced and lives through the call, which writes no more.
    let result = unsafe { libc::syscall(libc::SYS_sched_getaffinity, 0_i32, size_of_val(&words), words.as_mut_ptr()) };
    checked(result)?;
    let is_set = |cpu: &u32| words[*cpu as usize / CPU_BITS] >> (*cpu as usize % CPU_BITS) & 1 == 1;
    Ok((0..MAX_CPUS as u32).filter(is_set).collect())
}

/// Addresses of the pages that `bytes` touches.
fn pages(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let page = page_bytes();
    let Range { start, end } = bytes.as_ptr_range();
    (start as usize / page * page..end as usize).step_by(page)
}

/// What the kernel says of each page that `bytes` touches, in order: its node, or a negative error number (`-ENOENT`: not there).
/// With `to`, pages are moved to that node first; those that the kernel cannot move stay, and say so.
fn ask(bytes: &[u8], to: Option<u32>) -> io::Result<Vec<i32>> {
    let addresses: Vec<usize> = pages(bytes).collect();
    let mut statuses = Vec::with_capacity(addresses.len());
    for part in addresses.chunks(PAGES_AT_ONCE) {
        let targets = to.map(|node| vec![node as libc::c_int; part.len()]);
        let targets = targets.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
        let mut status = vec![-libc::ENOENT; part.len()];
        // SAFETY: process 0 is this one. The three arrays have `part.len()` elements and live through the call, which only writes
        // into `status`. The pages are given by number and need not exist: the kernel says so. Moving a page changes the physical
        // memory behind an address and keeps its contents; a thread that touches it meanwhile waits in the kernel.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0_i32,
                part.len(),
                part.as_ptr(),
                targets,
                status.as_mut_ptr(),
                if to.is_some() { MPOL_MF_MOVE } else { 0 },
            )
        };
        // A positive result counts pages that could not be moved; each has its reason in `status`.
        checked(result)?;
        statuses.append(&mut status);
    }
    Ok(statuses)
}

/// Bytes of `bytes` by where their pages are: `tell(Some(node), bytes)`, or `tell(None, bytes)` for pages that are not in this process's
/// memory. Pages at the ends count with the part that is inside.
///
/// # Errors
/// The system's reason: `EPERM` in a container that forbids the call, `ENOSYS` without NUMA.
pub fn locate(bytes: &[u8], mut tell: impl FnMut(Option<u32>, u64)) -> io::Result<()> {
    let page = page_bytes();
    let Range { start, end } = bytes.as_ptr_range();
    for (address, status) in pages(bytes).zip(ask(bytes, None)?) {
        let inside = (address + page).min(end as usize) - address.max(start as usize);
        tell(u32::try_from(status).ok(), inside as u64);
    }
    Ok(())
}

/// Moves those pages of `bytes` to `node` that are elsewhere and that no other process uses. Ask [`locate`] what became of it.
///
/// # Errors
/// The system's reason, as for [`locate`].
pub fn move_to(bytes: &[u8], node: u32) -> io::Result<()> {
    Mask::new(&[node])?;
    let misplaced = |s: &i32| u32::try_from(*s).is_ok_and(|at| at != node);
    if ask(bytes, None)?.iter().any(misplaced) {
        ask(bytes, Some(node))?;
    }
    Ok(())
}

/// Bytes of `bytes`, a part of a file's map, that are in the system's page cache, whether this process has touched them or not.
///
/// # Errors
/// The system's reason.
pub fn cached(bytes: &[u8]) -> io::Result<u64> {
    let page = page_bytes();
    let Range { start, end } = bytes.as_ptr_range();
    let first = start as usize / page * page;
    if bytes.is_empty() {
        return Ok(0);
    }
    let mut there = vec![0_u8; (end as usize - first).div_ceil(page)];
    // SAFETY: the range begins at a page and covers `there.len()` pages, of which the call writes one byte each; it reads nothing
    // of ours. The range is mapped: it is that of a slice, rounded to the pages it lies on.
    let result = unsafe { libc::mincore(first as *mut libc::c_void, end as usize - first, there.as_mut_ptr()) };
    checked(result.into())?;
    let inside = |i: usize| (first + (i + 1) * page).min(end as usize) - (first + i * page).max(start as usize);
    Ok(there.iter().enumerate().filter(|(_, t)| **t & 1 == 1).map(|(i, _)| inside(i) as u64).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    /// The first node with memory that this process may use, if the kernel has nodes and lets us ask.
    fn own_node() -> Option<u32> {
        let topology = crate::probe::nodes::Nodes::of_this_machine();
        let node = topology.usable().next()?.number;
        let probe = vec![1_u8; 8192];
        match locate(&probe, |_, _| {}) {
            Ok(()) => Some(node),
            Err(e) => {
                println!("skipped: move_pages is refused here ({e})");
                None
            }
        }
    }

    #[test]
    fn pages_are_where_they_were_bound() {
        let Some(node) = own_node() else { return };
        let page = page_bytes();
        for spread in [Spread::Bind, Spread::Interleave, Spread::WeightedInterleave] {
            let mut map = MmapMut::map_anon(8 * page).expect("memory");
            match bind(&mut map, &[node], spread) {
                Err(e) if spread == Spread::WeightedInterleave && e.raw_os_error() == Some(libc::EINVAL) => continue,
                other => other.expect("bound"),
            }
            map[page..3 * page + 1].fill(7);
            let (mut there, mut elsewhere, mut absent) = (0, 0, 0);
            // From the middle of a page to the middle of another: parts count as parts.
            let asked = page / 2..8 * page - 5;
            locate(&map[asked.clone()], |at, bytes| match at {
                Some(n) if n == node => there += bytes,
                Some(_) => elsewhere += bytes,
                None => absent += bytes,
            })
            .expect("asked");
            assert_eq!((there, elsewhere), (3 * page as u64, 0), "{spread:?}");
            assert_eq!(absent, asked.len() as u64 - 3 * page as u64, "{spread:?}");
            move_to(&map, node).expect("nothing to move");
        }
    }

    #[test]
    fn a_thread_stays_where_it_is_put() {
        let all = allowed_cpus().expect("asked");
        assert!(!all.is_empty() && all.is_sorted());
        let last = *all.last().expect("one at least");
        // A thread of its own: the test's keeps its processors.
        let there = std::thread::spawn(move || {
            run_on(&[last])?;
            allowed_cpus()
        });
        assert_eq!(there.join().expect("no panic").expect("moved"), [last]);
        assert_eq!(allowed_cpus().expect("asked"), all);
        assert_eq!(run_on(&[MAX_CPUS as u32]).expect_err("too large").kind(), io::ErrorKind::InvalidInput);
        assert!(run_on(&[]).is_err(), "a thread has to run somewhere");
    }

    #[test]
    fn nodes_that_are_not_there_are_refused() {
        let Some(_) = own_node() else { return };
        let mut map = MmapMut::map_anon(page_bytes()).expect("memory");
        assert!(bind(&mut map, &[777], Spread::Bind).is_err(), "no machine of ours has so many nodes");
        assert_eq!(bind(&mut map, &[MAX_NODES], Spread::Bind).expect_err("too large").kind(), io::ErrorKind::InvalidInput);
        assert!(move_to(&map, MAX_NODES).is_err());
    }

    #[test]
    fn the_page_cache_knows_a_file_that_was_just_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        let page = page_bytes();
        std::fs::write(&path, vec![3_u8; 3 * page + 100]).expect("written");
        let map = crate::gguf::map::map_file(&path, "a file").expect("mapped");
        // File systems without a page cache (some shares) may hold less; never more.
        let all = cached(&map).expect("asked");
        assert!(all <= map.len() as u64);
        std::hint::black_box(map.iter().map(|b| u64::from(*b)).sum::<u64>());
        assert_eq!(cached(&map[10..page + 20]).expect("asked"), page as u64 + 10);
        assert_eq!(cached(&[]).expect("nothing"), 0);
    }
}
