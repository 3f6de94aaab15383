//! A network between members whose links a test can cut, each direction separately.
//!
//! The peer URLs of the members are those of proxies. The handshake of a raft stream contains the IDs of its sender and receiver,
//! and a stream carries data in one direction only, so a proxy knows which link a connection uses. A cut link forwards nothing,
//! as if every packet were lost; when it heals, connections that stalled are closed, as they would be sooner or later.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

/// The beginning of the handshake: the preface, the purpose, and three numbers.
const PREFACE: &[u8] = b"metastore raft ";
const HELLO_BYTES: usize = 41;
const FROM_AT: usize = 25;

/// Which links are cut. Shared by the proxies of all members.
#[derive(Clone, Default)]
pub struct Network(Arc<(Mutex<Cuts>, Condvar)>);

#[derive(Default)]
struct Cuts {
    /// The IDs of sender and receiver.
    links: HashSet<(u64, u64)>,
    /// Increased whenever links heal: connections that stalled before are closed.
    healed: u64,
}

impl Network {
    /// Cuts the link from one member to another.
    pub fn cut(&self, from: u64, to: u64) {
        self.0.0.lock().unwrap().links.insert((from, to));
    }

    /// Cuts the links between a member and these others, in both directions.
    pub fn isolate(&self, member: u64, others: &[u64]) {
        for &other in others {
            self.cut(member, other);
            self.cut(other, member);
        }
    }

    /// Restores all links.
    pub fn heal(&self) {
        let mut cuts = self.0.0.lock().unwrap();
        cuts.links.clear();
        cuts.healed += 1;
        self.0.1.notify_all();
    }

    /// Returns true at once if the link works. If it is cut, waits until it heals and returns false.
    fn pass(&self, from: u64, to: u64) -> bool {
        let mut cuts = self.0.0.lock().unwrap();
        let before = cuts.healed;
        while cuts.links.contains(&(from, to)) && cuts.healed == before {
            cuts = self.0.1.wait_timeout(cuts, Duration::from_secs(1)).unwrap().0;
        }
        cuts.healed == before
    }
}

/// A proxy for the peer port of one member.
pub struct Proxy {
    address: String,
    /// The address where the member listens, which changes with every start.
    target: Arc<Mutex<Option<String>>>,
}

impl Proxy {
    /// Starts a proxy on a free port. Connections are closed until the target is set.
    pub fn start(network: &Network) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = Arc::new(Mutex::new(None));
        let (network, shared) = (network.clone(), target.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (network, target) = (network.clone(), shared.clone());
                thread::spawn(move || _ = serve(stream, &network, &target));
            }
        });
        Self { address, target }
    }

    /// The peer URL for the member list.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sets the address where the member listens.
    pub fn set_target(&self, address: String) {
        *self.target.lock().unwrap() = Some(address);
    }
}

fn serve(mut inside: TcpStream, network: &Network, target: &Mutex<Option<String>>) -> std::io::Result<()> {
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
    // Data in the other direction is the verdict about the stream, not messages of the other member: it passes.
    thread::spawn(move || forward(back_from, back_to, || true));
    forward(inside, outside, || passes(link));
    Ok(())
}

fn forward(mut from: TcpStream, mut to: TcpStream, passes: impl Fn() -> bool) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if !passes() || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
