//! Which web pages may read HTTP responses, and which host names clients may reach this member by.

use std::collections::BTreeSet;

use super::parse::FlagValues;
use crate::net::url;

/// A list that contains this, or is this, allows everything.
const ANY: &str = "*";

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessConfig {
    /// The origins (of web pages) that may read responses. None: all.
    pub origins: Option<BTreeSet<String>>,
    /// The host names that plain HTTP requests may be addressed to. None: all.
    pub hosts: Option<BTreeSet<String>>,
}

impl AccessConfig {
    pub(super) fn read(values: &FlagValues) -> Self {
        let origins = values.text("cors");
        let origins = (origins != ANY).then(|| {
            let urls = url::parse_each(origins).expect("a text is checked when it is set");
            urls.iter().map(|url| url.as_str().to_owned()).collect()
        });
        // As in etcd, an empty text is a list of one empty name, which no request has.
        let hosts: BTreeSet<String> = values.text("host-whitelist").split(',').map(str::to_owned).collect();
        Self { origins, hosts: (!hosts.contains(ANY)).then_some(hosts) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> AccessConfig {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let (values, _) = FlagValues::from_arguments(&arguments).unwrap_or_else(|_| panic!("{arguments:?}"));
        AccessConfig::read(&values)
    }

    fn set(texts: &[&str]) -> BTreeSet<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn everything_is_allowed_unless_a_list_is_given() {
        assert_eq!(read(&[]), AccessConfig::default());
        assert_eq!(read(&["--cors=*", "--host-whitelist=a,*"]), AccessConfig::default());
        let listed = read(&["--cors=http://b:8080, https://a:443", "--host-whitelist=a,b.example, c"]);
        assert_eq!(listed.origins, Some(set(&["http://b:8080", "https://a:443"])));
        assert_eq!(listed.hosts, Some(set(&["a", "b.example", " c"])), "as in etcd, spaces belong to the names");
        assert_eq!(read(&["--host-whitelist="]).hosts, Some(set(&[""])));
    }
}
