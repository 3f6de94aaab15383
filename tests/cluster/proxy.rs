//! A network between members that a test can cut, link by link and one way at a time.
//!
//! Members are told to reach each other at proxies. A stream of raft's says at its beginning from whom it is and to whom, and
//! goes in one direction only, so a proxy knows which link it carries. A cut link takes nothing any more, as if every packet
//! were lost; when it heals, connections that stalled are closed, as they would be sooner or later.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

/// As members greet each other: the preface, the purpose, and three numbers.
const PREFACE: &[u8] = b"metastore raft ";
const HELLO_BYTES: usize = 41;
const FROM_AT: usize = 25;

/// Which links are cut. Shared by the proxies of all members.
#[derive(Clone, Default)]
pub struct Network(Arc<(Mutex<Cuts>, Condvar)>);

#[derive(Default)]
struct Cuts {
    /// From whom to whom, by ID.
    links: HashSet<(u64, u64)>,
    /// Grows whenever links heal: whoever stalled before must connect again.
    healed: u64,
}

impl Network {
    /// Nothing goes from one to the other any more.
    pub fn cut(&self, from: u64, to: u64) {
        self.0.0.lock().unwrap().links.insert((from, to));
    }

    /// Nothing goes between one and all these others any more.
    pub fn isolate(&self, member: u64, others: &[u64]) {
        for &other in others {
            self.cut(member, other);
            self.cut(other, member);
        }
    }

    /// Everything goes everywhere again.
    pub fn heal(&self) {
        let mut cuts = self.0.0.lock().unwrap();
        cuts.links.clear();
        cuts.healed += 1;
        self.0.1.notify_all();
    }

    /// Returns at once where a link is whole: true if nothing stalled. Waits where it is cut, until it heals: false.
    fn pass(&self, from: u64, to: u64) -> bool {
        let mut cuts = self.0.0.lock().unwrap();
        let before = cuts.healed;
        while cuts.links.contains(&(from, to)) && cuts.healed == before {
            cuts = self.0.1.wait_timeout(cuts, Duration::from_secs(1)).unwrap().0;
        }
        cuts.healed == before
    }
}

/// Where a member is reached.
pub struct Proxy {
    address: String,
    /// Where it really listens; it changes with every start.
    target: Arc<Mutex<Option<String>>>,
}

impl Proxy {
    /// A proxy on a port of the system's choice. Until it is told where to, nobody is reached.
    pub fn start(network: &Network) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = Arc::new(Mutex::new(None));
        let (network, shared) = (network.clone(), target.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (network, target) = (network.clone(), shared.clone());
                thread::spawn(move || _ = carry(stream, &network, &target));
            }
        });
        Self { address, target }
    }

    /// What members are told.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The member listens there now.
    pub fn lead_to(&self, address: String) {
        *self.target.lock().unwrap() = Some(address);
    }
}

fn carry(mut inside: TcpStream, network: &Network, target: &Mutex<Option<String>>) -> std::io::Result<()> {
    let mut first = [0; PREFACE.len()];
    inside.read_exact(&mut first)?;
    let mut begin = first.to_vec();
    let mut link = None;
    if first == PREFACE {
        begin.resize(HELLO_BYTES, 0);
        inside.read_exact(&mut begin[PREFACE.len()..])?;
        let number = |at: usize| u64::from_be_bytes(begin[at..at + 8].try_into().unwrap());
        link = Some((number(FROM_AT), number(FROM_AT + 8)));
    }
    let passes = |link: Option<(u64, u64)>| link.is_none_or(|(from, to)| network.pass(from, to));
    if !passes(link) {
        return Ok(());
    }
    let Some(address) = target.lock().unwrap().clone() else { return Ok(()) };
    let mut outside = TcpStream::connect(address)?;
    outside.set_nodelay(true)?;
    inside.set_nodelay(true)?;
    outside.write_all(&begin)?;
    let (back_from, back_to) = (outside.try_clone()?, inside.try_clone()?);
    // What comes back on a stream are words about it, not messages of the other member: they pass.
    thread::spawn(move || pour(back_from, back_to, || true));
    pour(inside, outside, || passes(link));
    Ok(())
}

fn pour(mut from: TcpStream, mut to: TcpStream, passes: impl Fn() -> bool) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if !passes() || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
