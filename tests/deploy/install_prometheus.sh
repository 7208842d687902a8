#!/bin/sh
# Installs Debian's Prometheus without starting its service, now or at the next boot. Run as root.
set -eu

# systemd: a masked unit is neither enabled nor started. `systemctl unmask prometheus` gives it back.
unit=/etc/systemd/system/prometheus.service
if [ -d /etc/systemd/system ] && [ ! -e "$unit" ]; then
	ln -s /dev/null "$unit"
fi

# Other init systems: invoke-rc.d asks this program first; 101 forbids. Container images often have it already.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
fi

apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus
