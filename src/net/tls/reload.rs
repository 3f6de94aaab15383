//! Certificates, keys, CA certificates and revocation lists that are read again when their files change, so that they can be
//! renewed without a restart.
//!
//! The files are looked at before each handshake, and every minute. If the new files cannot be used, because one of them is
//! missing or the key does not match yet, what was last loaded stays in use, with a warning.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio_rustls::rustls::pki_types::CertificateDer;

use super::{Side, open_error, parse};
use crate::metrics::METRICS;

/// A certificate that expires sooner than this is warned of, once a day.
const WARN_DAYS: i64 = 30;
const DAY: Duration = Duration::from_hours(24);

/// What identifies the content of a file: when it was modified, its length, and its inode.
type Stamp = (SystemTime, u64, u64);

/// Something that is made from files, and made again when they have changed.
pub(super) struct Reloaded<T> {
    side: Side,
    /// The flag that names the certificate.
    flag: &'static str,
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<Loaded<T>, String> + Send + Sync>,
    current: Mutex<Current<T>>,
}

/// What was made from the files.
pub(super) struct Loaded<T> {
    pub value: Arc<T>,
    /// When the certificate expires, in seconds of unix time; None without a certificate.
    pub expires: Option<i64>,
}

struct Current<T> {
    stamps: Vec<Stamp>,
    loaded: Loaded<T>,
    /// Why the newest files cannot be used, if that has been logged.
    failure: Option<String>,
    /// The days until the certificate expires, when that was last logged.
    logged_days: Option<i64>,
}

impl<T> Reloaded<T> {
    /// Reads the files for the first time.
    pub fn open(
        side: Side,
        flag: &'static str,
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<Loaded<T>, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let stamps = stamps(&files)?;
        let loaded = load()?;
        let current = Mutex::new(Current { stamps, loaded, failure: None, logged_days: None });
        let reloaded = Self { side, flag, files, load: Box::new(load), current };
        reloaded.report_expiry(&mut reloaded.current.lock());
        Ok(reloaded)
    }

    /// What the files contain now, or what they last contained that could be used.
    pub fn current(&self) -> Arc<T> {
        let stamps = stamps(&self.files);
        let mut current = self.current.lock();
        let renewed = match stamps {
            Ok(stamps) if stamps == current.stamps => return current.loaded.value.clone(),
            Ok(stamps) => {
                current.stamps = stamps; // Files that cannot be used are not read again until they change.
                (self.load)()
            }
            Err(error) => Err(error),
        };
        let side = self.side.name();
        match renewed {
            Ok(loaded) => {
                (current.loaded, current.failure) = (loaded, None);
                tracing::info!(side, flag = self.flag, "TLS files have changed and were read again");
                current.logged_days = None;
                self.report_expiry(&mut current);
            }
            Err(error) if current.failure.as_ref() == Some(&error) => (),
            Err(error) => {
                tracing::warn!(side, %error, "cannot use the changed TLS files; those read before stay in use");
                current.failure = Some(error);
            }
        }
        current.loaded.value.clone()
    }

    /// To be called regularly, so that changes are noticed even if there are no connections.
    pub fn refresh(&self) {
        self.current();
        self.report_expiry(&mut self.current.lock());
    }

    /// Sets the metric, and logs how long the certificate is valid: when it was read, and daily when it expires soon.
    fn report_expiry(&self, current: &mut Current<T>) {
        let Some(expires) = current.loaded.expires else { return };
        METRICS.certificate_expiry.with_label_values(&[self.flag]).set(expires);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let left = expires.saturating_sub(i64::try_from(now).unwrap_or(i64::MAX));
        let days = left.div_euclid(i64::try_from(DAY.as_secs()).unwrap_or(i64::MAX));
        let is_read_now = current.logged_days.is_none();
        if !is_read_now && (days >= WARN_DAYS || current.logged_days == Some(days)) {
            return;
        }
        current.logged_days = Some(days);
        let (side, flag) = (self.side.name(), self.flag);
        if left < 0 {
            tracing::error!(side, flag, days, "the TLS certificate has expired: connections fail until it is renewed");
        } else if days < WARN_DAYS {
            tracing::warn!(side, flag, days, "the TLS certificate expires soon");
        } else {
            tracing::info!(side, flag, days, "TLS certificate in use");
        }
    }
}

/// When the first certificate of a chain expires.
pub(super) fn expiry(chain: &[CertificateDer<'_>]) -> Option<i64> {
    Some(parse(chain.first()?)?.validity().not_after.timestamp())
}

fn stamps(files: &[PathBuf]) -> Result<Vec<Stamp>, String> {
    files.iter().map(|path| stamp(path).map_err(|error| open_error(path, &error))).collect()
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.modified()?, metadata.len(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reloaded(path: &Path) -> Result<Reloaded<String>, String> {
        let file = path.to_owned();
        Reloaded::open(Side::Clients, "cert-file", vec![file.clone()], move || {
            let text = fs::read_to_string(&file).map_err(|error| error.to_string())?;
            let value = text.strip_prefix("good ").ok_or_else(|| format!("{text:?} is no good"))?;
            Ok(Loaded { value: Arc::new(value.to_owned()), expires: None })
        })
    }

    #[test]
    fn the_last_usable_content_stays_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let missing = reloaded(&path).err().expect("there is no file");
        assert_eq!(missing, format!("open {}: no such file or directory", path.display()));
        fs::write(&path, "bad").unwrap();
        assert_eq!(reloaded(&path).err().as_deref(), Some("\"bad\" is no good"));
        fs::write(&path, "good 1").unwrap();
        let file = reloaded(&path).unwrap();
        assert_eq!(*file.current(), "1");
        fs::write(&path, "bad again").unwrap();
        assert_eq!(*file.current(), "1");
        assert_eq!(file.current.lock().failure.as_deref(), Some("\"bad again\" is no good"));
        fs::remove_file(&path).unwrap();
        assert_eq!(*file.current(), "1");
        fs::write(&path, "good two").unwrap();
        assert_eq!(*file.current(), "two");
        assert_eq!(file.current.lock().failure, None);
    }

    #[test]
    fn a_file_that_replaces_another_is_noticed_although_time_and_length_are_equal() {
        let directory = tempfile::tempdir().unwrap();
        let [path, other] = ["file", "other"].map(|name| directory.path().join(name));
        fs::write(&path, "good 1").unwrap();
        let file = reloaded(&path).unwrap();
        fs::write(&other, "good 2").unwrap();
        let times = fs::FileTimes::new().set_modified(fs::metadata(&path).unwrap().modified().unwrap());
        fs::File::options().write(true).open(&other).unwrap().set_times(times).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(*file.current(), "2");
    }
}
