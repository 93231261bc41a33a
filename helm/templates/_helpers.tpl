{{- define "flywheel.labels" -}}
app.kubernetes.io/part-of: character-flywheel
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What every container here may not do. */}}
{{- define "flywheel.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "flywheel.user" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "flywheel.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "flywheel.image" -}}
{{- required (printf "images.%s is empty: name the image that docker/build made" .name) (index .root.Values.images .name) }}
{{- end }}

{{/* MLflow keeps something on its volume, which one pod at a time can mount. */}}
{{- define "flywheel.mlflowVolume" -}}{{- if not (and .Values.mlflow.database.secret .Values.mlflow.artifacts) }}yes{{- end }}{{- end }}

{{- define "flywheel.rayToken" -}}{{ .Values.ray.token.secret | default (printf "%s-ray-token" .Release.Name) }}{{- end }}
{{- define "flywheel.mlflowAdmin" -}}{{ .Values.mlflow.admin.secret | default (printf "%s-mlflow-admin" .Release.Name) }}{{- end }}
{{- define "flywheel.mlflowClient" -}}{{ .Values.mlflow.client.secret | default (printf "%s-mlflow-client" .Release.Name) }}{{- end }}
{{- define "flywheel.mlflowUri" -}}http://{{ .Release.Name }}-mlflow.{{ .Release.Namespace }}.svc:{{ .Values.mlflow.port }}{{- end }}

{{/* What a stage is told, wherever it runs; nothing here is secret. */}}
{{- define "flywheel.environment" -}}
FLYWHEEL_PROFILE: {{ .Values.profile | quote }}
{{- if .Values.mlflow.enabled }}
MLFLOW_TRACKING_URI: {{ include "flywheel.mlflowUri" . | quote }}
{{- with .Values.mlflow.url }}
FLYWHEEL_MLFLOW_UI: {{ . | quote }}
{{- end }}
{{- end }}
{{- range $name, $value := .Values.store.environment }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Secrets that become variables: the store's and the tracking server's, by reference. */}}
{{- define "flywheel.envFrom" -}}
{{- if .Values.store.credentials }}
- secretRef: {name: {{ .Values.store.credentials }}}
{{- end }}
{{- end }}

{{- define "flywheel.mlflowLogin" -}}
{{- if .Values.mlflow.enabled }}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom: {secretKeyRef: {name: {{ include "flywheel.mlflowClient" . }}, key: username}}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "flywheel.mlflowClient" . }}, key: password}}
{{- end }}
{{- end }}

{{- define "flywheel.volumes" -}}
{{- range .Values.volumes }}
- name: {{ .name }}
  persistentVolumeClaim: {claimName: {{ .claim }}, readOnly: {{ .readOnly | default false }}}
{{- end }}
{{- end }}

{{- define "flywheel.volumeMounts" -}}
{{- range .Values.volumes }}
- {name: {{ .name }}, mountPath: {{ .mountPath }}, readOnly: {{ .readOnly | default false }}}
{{- end }}
{{- end }}

{{/* The pod that every stage's pod starts from; the launcher adds image, arguments, resources and limits. */}}
{{- define "flywheel.stagePod" -}}
spec:
  serviceAccountName: {{ .root.Release.Name }}-stage
  {{- include "flywheel.pullSecrets" .root | nindent 2 }}
  {{- with .nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: base
      imagePullPolicy: {{ .root.Values.images.pullPolicy }}
      {{- with include "flywheel.mlflowLogin" .root | trim }}
      env: {{ . | nindent 8 }}
      {{- end }}
      {{- with include "flywheel.envFrom" .root | trim }}
      envFrom: {{ . | nindent 8 }}
      {{- end }}
      {{- with include "flywheel.volumeMounts" .root | trim }}
      volumeMounts: {{ . | nindent 8 }}
      {{- end }}
  {{- with include "flywheel.volumes" .root | trim }}
  volumes: {{ . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* One pod of the Ray cluster. */}}
{{- define "flywheel.rayPod" }}
metadata:
  labels:
    app.kubernetes.io/name: flywheel-ray
    {{- include "flywheel.labels" .root | nindent 4 }}
  {{- if .root.Values.metrics.scrape }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "8080"
    prometheus.io/path: /metrics
  {{- end }}
spec:
  serviceAccountName: {{ .root.Release.Name }}-ray
  automountServiceAccountToken: false
  {{- include "flywheel.pullSecrets" .root | nindent 2 }}
  securityContext: {{ include "flywheel.user" .root | nindent 4 }}
  {{- if .gpus }}
  {{- with .root.Values.stages.gpu.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.stages.gpu.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ .root.Values.images.tasksGpu | default (include "flywheel.image" (dict "root" .root "name" "tasks")) }}
      imagePullPolicy: {{ .root.Values.images.pullPolicy }}
      env:
        # Every call to the cluster, jobs included, needs the token; the user key never comes here.
        - {name: RAY_AUTH_MODE, value: token}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - name: RAY_AUTH_TOKEN
          valueFrom: {secretKeyRef: {name: {{ include "flywheel.rayToken" .root }}, key: auth_token}}
        {{- include "flywheel.mlflowLogin" .root | trim | nindent 8 }}
        {{- range $name, $value := (include "flywheel.environment" .root | fromYaml) }}
        - {name: {{ $name }}, value: {{ $value | quote }}}
        {{- end }}
      {{- with include "flywheel.envFrom" .root | trim }}
      envFrom: {{ . | nindent 8 }}
      {{- end }}
      {{- if .ports }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: metrics, containerPort: 8080}
      {{- else }}
      ports:
        - {name: metrics, containerPort: 8080}
      {{- end }}
      readinessProbe:
        tcpSocket: {port: {{ .ready }}}
        periodSeconds: 10
        failureThreshold: 30
      livenessProbe:
        tcpSocket: {port: {{ .ready }}}
        initialDelaySeconds: 60
        periodSeconds: 30
        failureThreshold: 10
      resources: {{ .resources | nindent 8 }}
      securityContext: {{ include "flywheel.confined" .root | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/flywheel}
        - {name: shm, mountPath: /dev/shm}
        {{- include "flywheel.volumeMounts" .root | trim | nindent 8 }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory}}
    {{- include "flywheel.volumes" .root | trim | nindent 4 }}
{{- end }}

{{- define "flywheel.dns" }}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}
